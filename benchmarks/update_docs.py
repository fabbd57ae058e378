#!/usr/bin/env python
"""Makes the tables and plots of README.md, docs/ and benchmarks/README.md anew from benchmarks/results.

A table lies between ``<!-- NAME -->`` and ``<!-- end of NAME -->``; :data:`SECTIONS` says what it is made of.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import coverage_tables, pages
from benchmarks.accuracy import format_runs, group_runs, with_more_seeds
from benchmarks.cost_tables import load_rows, report
from benchmarks.formats import table
from benchmarks.plots import draw_accuracy, draw_growth, draw_shared
from benchmarks.recipe_tables import format_around, format_outlines, format_recipe, format_recipe_means
from benchmarks.training import ROOT
from e3va_mm.families.registry import TABLE

RESULTS, REPORT = ROOT / 'benchmarks/results', 'benchmarks/README.md'
TRAININGS = ('small_sets', 'folds', 'guard', 'quantised_guard', 'backbones', 'heads', 'recommended', 'rates')
TRAININGS += ('demo_rates', 'taps', 'sgd', 'shapes_methods_cpu')
COSTS = ('swin', 'dinov2', 'resnet', 'methods', 'small_sets', 'mixers', 'cpu', 'cpu_sizes', 'cpu_mixers')

# Of a GPU and a CPU; what is missing is left out.
SHARED = ('shared_pass', 'shared_pass_cpu')

COVERAGE = {
    'toolboxes': coverage_tables.format_toolboxes,
    'backbones': coverage_tables.format_backbones,
    'failures': coverage_tables.format_failures,
}


def _runs(path: Path) -> str:
    return format_runs(group_runs(pages.read(path)))


def _more_seeds(*paths: Path) -> str:
    return format_runs(with_more_seeds(group_runs(*map(pages.read, paths))))


def _costs(path: Path) -> str:
    return report(load_rows(path))


def _soak(path: Path) -> str:
    settings = pages.read(path)['settings']
    rows = [(name, result['kills'], result['trainings']) for name, result in settings.items() if 'kills' in result]
    total = ['all', *(sum(row[column] for row in rows) for column in (1, 2))]
    return table(
        ['checkpoint hook', 'kills', 'trainings, all of which ended as one that nobody killed'], [*rows, total]
    )


def _families() -> str:
    titles = ['family', 'models, for example', 'taps', 'from stage to stage, on the highway', 'maps (strides)']
    return table(titles, [[row.title, f'`{row.example}`', row.taps, row.crossing, row.strides] for row in TABLE])


# Page, name, what makes the table, and the result files it is made of.
SECTIONS: list[tuple[str, str, Callable[..., str], tuple[str, ...]]] = [
    ('README.md', 'demo', pages.format_demo, ('demo',)),
    ('README.md', 'costs', pages.format_costs, ('amp',)),
    ('adapters/README.md', 'adapters', pages.format_adapters, ('adapters',)),
    ('docs/memory.md', 'costs', pages.format_all_costs, ('amp',)),
    *(('docs/memory.md', name, pages.format_fits, (name,)) for name in ('fits', 'fits_giants')),
    ('docs/several_gpus.md', 'gradients', _costs, ('gradients',)),
    ('docs/several_gpus.md', 'several_gpus', pages.format_scaling, ('several_gpus',)),
    ('docs/shared.md', 'shared', pages.format_shared, SHARED),
    ('docs/deployment.md', 'latency', pages.format_latency, ('latency_gpu', 'latency_cpu')),
    ('docs/methods.md', 'results', pages.format_methods, ('small_sets', 'steps')),
    ('docs/methods.md', 'recipe_means', format_recipe_means, ('recipe',)),
    ('README.md', 'recipe_means', format_recipe_means, ('recipe',)),
    (REPORT, 'recipe', format_recipe, ('recipe',)),
    (REPORT, 'around', format_around, ('recipe',)),
    (REPORT, 'outlines', format_outlines, ('recipe',)),
    ('docs/backbones.md', 'families', _families, ()),
    *(('docs/coverage.md', name, make, ('coverage',)) for name, make in COVERAGE.items()),
    (REPORT, 'before_after_cost', _costs, ('before_after_cost',)),
    (REPORT, 'before_after_accuracy', pages.format_packages, ('before_after_accuracy',)),
    (REPORT, 'masks', _costs, ('masks',)),
    (REPORT, 'operators', _costs, ('operators',)),
    (REPORT, 'soak', _soak, ('soak',)),
    (REPORT, 'target', pages.format_target, ('small_sets', 'more_seeds', 'steps')),
    (REPORT, 'more_seeds', _more_seeds, ('small_sets', 'more_seeds')),
    *((REPORT, name, _runs, (name,)) for name in TRAININGS),
    *((REPORT, name, _costs, (name,)) for name in ('steps', *(f'cost_{name}' for name in COSTS))),
]


def replace_section(text: str, name: str, content: str) -> str:
    """``text`` with another section.

    Raises:
        ValueError: there is no such section, or more than one.
    """
    start, end = f'<!-- {name} -->', f'<!-- end of {name} -->'
    if text.count(start) != 1 or text.count(end) != 1:
        raise ValueError(f'expected {start} and {end} once each')
    before, _, rest = text.partition(start)
    return f'{before}{start}\n{content}\n{end}{rest.partition(end)[2]}'


def updated_pages() -> tuple[dict[str, str], list[str]]:
    """The pages by their path, with all tables as the result files have them; and what could not be made, and why."""
    texts: dict[str, str] = {}
    failed = []
    for page, name, make, files in SECTIONS:
        try:
            text = texts.get(page) or (ROOT / page).read_text()
            texts[page] = replace_section(text, name, make(*(RESULTS / f'{file}.json' for file in files)))
        except (FileNotFoundError, ValueError) as error:
            failed.append(f'{page}, {name}: {error}')
    return texts, failed


def main() -> None:
    if sys.argv[1:]:
        sys.exit(f'usage: python benchmarks/update_docs.py\n\n{__doc__}')
    texts, failed = updated_pages()
    for page, text in texts.items():
        (ROOT / page).write_text(text)
    draw_accuracy(pages.shown_in_plot(RESULTS / 'small_sets.json'), ROOT / 'benchmarks/images/small_sets.png')
    measured = [RESULTS / f'{name}.json' for name in SHARED if (RESULTS / f'{name}.json').is_file()]
    draw_shared([row for path in measured for row in pages.shared_rows(path)], ROOT / 'docs/images/shared_pass.png')
    growth = [RESULTS / f'{name}.json' for name in ('growth_images', 'growth_backbones', 'fits_giants')]
    pictures = ('docs/images/growth_images.png', 'docs/images/growth_backbones.png')
    for rows, picture in zip(pages.growth_rows(*growth), pictures):
        if rows:
            draw_growth(rows, ROOT / picture)
    if failed:
        sys.exit('not made:\n' + '\n'.join(failed))


if __name__ == '__main__':
    main()
