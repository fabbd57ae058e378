#!/usr/bin/env python
"""Makes the tables and plots of README.md and docs/ anew from the result files; what is around them is written by hand.

A table lies between ``<!-- NAME -->`` and ``<!-- end of NAME -->``; :data:`SECTIONS` says what it is made of.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import demo
import summarize
from experiments import ROOT
from method_specs import without_rates
from summarize_benchmark import draw, format_table, group_rows, load_rows, report

# The variants of E³VA that held-out images pick, for segmentation and for detectors, and their likes without a block of
# the backbone in the graph.
PICKED = ('e3va+rank4+mixer96+graph1', 'e3va+rank4+mixer96+graph1+rate10')
LIGHT = ('e3va+rank4+mixer96', 'e3va+rank4+mixer96+rate10')
SEQUENTIAL = ('adapter', 'lora', 'mona')
# Columns and rows of the README's overview; the rows are methods at batch 8 with fp32 heads.
OVERVIEW_MODELS = {
    'upernet swin-l': 'UPerNet Swin-L, 512²',
    'cascade-mask-rcnn swin-b': 'Cascade Mask R-CNN Swin-B, 800 × 1344',
    'retinanet swin-l': 'RetinaNet Swin-L, 800 × 1344',
}
OVERVIEW_METHODS = {
    'full': 'full fine-tuning',
    'full+checkpointed': 'full, activation checkpointing',
    'frozen': 'frozen backbone',
    'e3va': 'E³VA, `frozen_dtype=None`',
    'e3va+bf16': 'E³VA, `bf16` (default)',
    'e3va+bf16+taps-float8': 'E³VA, `bf16`, `taps-float8`',
    'e3va+bf16+taps-float8+sampled': '… and `saved_fraction=0.125`',
}
# Rows of the table of ratios: label, batch size, precision, method, key.
RATIOS = [
    ('batch 8: memory, `bf16`', 8, 'fp32', 'e3va+bf16', 'peak_memory_mib'),
    ('batch 8: memory, `bf16+taps-float8`', 8, 'fp32', 'e3va+bf16+taps-float8', 'peak_memory_mib'),
    ('batch 8: memory, … `+sampled`', 8, 'fp32', 'e3va+bf16+taps-float8+sampled', 'peak_memory_mib'),
    ('batch 8: time, no option', 8, 'fp32', 'e3va', 'step_seconds'),
    ('batch 8: time, `bf16`', 8, 'fp32', 'e3va+bf16', 'step_seconds'),
    ('batch 8: time of kernels without copies from the host, `bf16`', 8, 'fp32', 'e3va+bf16', 'kernel_seconds'),
    ('batch 8, AMP: time, `fp16`', 8, 'amp-fp16', 'e3va+fp16', 'step_seconds'),
    ('batch 8, AMP: time, `fp16+compiled`', 8, 'amp-fp16', 'e3va+fp16+compiled', 'step_seconds'),
    ('batch 8, AMP: memory, `fp16+taps-float8`', 8, 'amp-fp16', 'e3va+fp16+taps-float8', 'peak_memory_mib'),
    ('batch 2: time, `bf16`', 2, 'fp32', 'e3va+bf16', 'step_seconds'),
    ('batch 2: memory, `bf16`', 2, 'fp32', 'e3va+bf16', 'peak_memory_mib'),
]


def _picked(content: dict) -> dict:
    return summarize.without_variants(content, PICKED + LIGHT)


def _of_content(make: Callable[[dict], str]) -> Callable[[Path], str]:
    """``make`` of what a result file holds."""
    return lambda path: make(json.loads(path.read_text()))


_demo = _of_content(lambda content: demo.format_table(content['rows']))
_accuracy = _of_content(summarize.summarize)
_pivot = _of_content(lambda content: summarize.pivot(_picked(content)))


def steps_of(path: Path) -> dict[tuple[str, str], dict]:
    """The rows of tools/benchmark_steps.py on real data, by data set and method."""
    rows = (row for row in load_rows(path) if row['data'] == 'real')
    return {(summarize.dataset_of(row['config']), row['method']): row for row in rows}


def _accuracy_and_step(path: Path, steps: Path) -> str:
    """The table of runs that shared a device, with the steps of their methods measured in turn."""
    seconds = {key: row['step_seconds'] for key, row in steps_of(steps).items()}
    return summarize.summarize(json.loads(path.read_text()), alone=seconds)


def more_seeds(*contents: dict) -> dict:
    """The runs of the methods that have more seeds than three on a data set."""
    runs = {name: run for content in contents for name, run in content['runs'].items()}
    more = {(run['config'], run['method']) for run in runs.values() if run['seed'] > 2}
    return {'runs': {name: run for name, run in runs.items() if (run['config'], run['method']) in more}}


def _more_seeds(*paths: Path) -> str:
    return summarize.summarize(more_seeds(*(json.loads(path.read_text()) for path in paths)))


def lead(dataset: str, runs: list[dict], others: list[dict]) -> tuple[float, float]:
    """The mean lead over others on the same seeds and folds, and its standard error."""
    own, other = (
        {(run['seed'], run.get('fold')): summarize.values_of(dataset, [run])[0] for run in group}
        for group in (runs, others)
    )
    leads = [own[key] - other[key] for key in own.keys() & other.keys()]
    return statistics.mean(leads), statistics.stdev(leads) / len(leads) ** 0.5


def format_target(small_sets: Path, more: Path, steps: Path) -> str:
    """What is asked of variants: the lead over the best sequential method, memory and step."""
    contents = [json.loads(path.read_text()) for path in (small_sets, more)]
    in_turn = steps_of(steps)
    three, nine = summarize.group_runs(contents[0]), summarize.group_runs(more_seeds(*contents))
    lines = ['| data set | variant | lead, 3 seeds | lead, 9 seeds | memory | step |', '|---' * 6 + '|']
    for dataset, methods in three.items():
        best = max(SEQUENTIAL, key=lambda method: statistics.mean(summarize.values_of(dataset, methods[method])))
        for method in filter(methods.__contains__, LIGHT + PICKED):
            memory = summarize.peak_memory(methods[method]) / summarize.peak_memory(methods['e3va'])
            step = in_turn[dataset, without_rates(method)]['of_first']
            leads = (
                '{:+.1f} ± {:.1f}'.format(*lead(dataset, of[dataset][method], of[dataset][best]))
                for of in (three, nine)
            )
            lines.append(f'| {dataset} | {method} | ' + ' | '.join(leads) + f' | {memory:.2f} | {step:.2f} |')
    return '\n'.join(lines)


def _dinov2(path: Path) -> str:
    return format_table([row for row in load_rows(path) if '-g_' in row['model'] and row['image_size'] == [896, 896]])


def format_overview(path: Path) -> str:
    """Memory and time of the tasks at batch 8 with fp32 heads; a row a method."""
    cells = {
        (row['model'], row['method']): f'{row["peak_memory_mib"] / 1024:.1f} GiB / {1000 * row["step_seconds"]:.0f} ms'
        for row in load_rows(path)
        if (row['batch_size'], row['precision']) == (8, 'fp32')
    }
    lines = ['| peak memory / step | ' + ' | '.join(OVERVIEW_MODELS.values()) + ' |', '|---' * 4 + '|']
    for method, label in OVERVIEW_METHODS.items():
        lines.append(f'| {label} | ' + ' | '.join(cells[model, method] for model in OVERVIEW_MODELS) + ' |')
    return '\n'.join(lines)


def format_ratios(*paths: Path) -> str:
    """Memory and time in units of the frozen backbone's in the same file; the last file that has both counts."""
    ratios = {}
    for path in paths:
        keys = ('model', 'batch_size', 'precision', 'memory_cap')
        for (model, batch, precision, _), group in group_rows(load_rows(path), *keys).items():
            by_method = {row['method']: row for row in group if row['batch_size']}
            frozen = by_method.get('frozen')
            for method, row in by_method.items():
                for key in ('peak_memory_mib', 'step_seconds', 'kernel_seconds'):
                    if frozen and key in row and key in frozen:
                        ratios[model, batch, precision, method, key] = row[key] / frozen[key]
    lines = ['| of frozen | ' + ' | '.join(OVERVIEW_MODELS.values()) + ' |', '|---' * 4 + '|']
    for label, *setting in RATIOS:
        values = [ratios.get((model, *setting)) for model in OVERVIEW_MODELS]
        lines.append(f'| {label} | ' + ' | '.join(f'{value:.2f}' if value else '' for value in values) + ' |')
    return '\n'.join(lines)


class Costs(NamedTuple):
    """Of a training step: what it takes, or what it takes of another's."""

    memory: float
    kernel_time: float
    kernels: float
    step: float


def costs_of_plain(path: Path) -> dict[tuple[str, str], Costs]:
    """``{(model, method): costs}`` in units of the first method of the model, which is E³VA without variants."""
    ratios = {}
    for (model,), group in group_rows(load_rows(path), 'model').items():
        plain, *others = group
        for row in others:
            ratios[model, row['method']] = Costs(*(one / other for one, other in zip(_costs(row), _costs(plain))))
    return ratios


def _costs(row: dict) -> Costs:
    calls = row['runs'][0]['most_time'][0]['calls']
    return Costs(row['peak_memory_mib'], row['kernel_seconds'], calls, row['step_seconds'])


def format_mixers(path: Path) -> str:
    """What variants take of E³VA's costs."""
    lines = ['| | | memory | time of kernels | kernels | step |', '|---' * 6 + '|']
    for (model, method), costs in costs_of_plain(path).items():
        lines.append(f'| {model} | {method} | ' + ' | '.join(f'{ratio:.2f}' for ratio in costs) + ' |')
    return '\n'.join(lines)


# Page, name, what makes the table, and the result files it is made of.
SECTIONS: list[tuple[str, str, Callable[..., str], tuple[str, ...]]] = [
    ('README.md', 'demo table', _demo, ('demo',)),
    ('README.md', 'performance table', format_overview, ('benchmark_gpu',)),
    ('README.md', 'dinov2 table', _dinov2, ('benchmark_dinov2',)),
    ('README.md', 'results table', _pivot, ('small_sets',)),
    ('docs/methods.md', 'small sets', _accuracy_and_step, ('small_sets', 'steps')),
    ('docs/methods.md', 'target', format_target, ('small_sets', 'more_seeds', 'steps')),
    ('docs/methods.md', 'more seeds', _more_seeds, ('small_sets', 'more_seeds')),
    ('docs/methods.md', 'folds', _accuracy, ('folds',)),
    ('docs/methods.md', 'shapes methods', _accuracy, ('shapes_methods_cpu',)),
    ('docs/methods.md', 'camvid cpu', _accuracy, ('camvid_cpu',)),
    ('docs/methods.md', 'rates', _accuracy, ('rates',)),
    ('docs/backbones.md', 'backbones', _accuracy, ('backbones',)),
    ('docs/performance.md', 'guard', _accuracy, ('guard',)),
    ('docs/performance.md', 'mixers', format_mixers, ('benchmark_mixers',)),
    ('docs/performance.md', 'steps', report, ('steps',)),
    ('docs/performance.md', 'of frozen', format_ratios, ('benchmark_gpu', 'benchmark_compiled')),
    *(
        ('docs/benchmarks.md', name, report, (name,))
        for name in (
            'benchmark_gpu',
            'benchmark_compiled',
            'benchmark_dinov2',
            'benchmark_cpu',
            'benchmark_cpu_sizes',
            'benchmark_cpu_mixer',
            'benchmark_mixers',
            'benchmark_methods',
            'benchmark_small_sets',
            'benchmark_groups',
        )
    ),
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


def updated_pages() -> dict[str, str]:
    """The pages by their path, with all tables as the result files have them."""
    pages: dict[str, str] = {}
    for page, name, make, files in SECTIONS:
        text = pages.get(page) or (ROOT / page).read_text()
        pages[page] = replace_section(text, name, make(*(ROOT / 'results' / f'{file}.json' for file in files)))
    return pages


def redraw(pages: dict[str, str]) -> None:
    """Draws the plots of measurements that a page shows into docs/images."""
    shown, images = ''.join(pages.values()), ROOT / 'docs/images'
    with tempfile.TemporaryDirectory() as folder:
        for path in (ROOT / 'results').glob('benchmark_*.json'):
            draw(load_rows(path), Path(folder), path.stem)
        for plot in Path(folder).iterdir():
            if plot.name in shown:
                shutil.copy(plot, images)
    for name, choose in (('shapes_methods_cpu', dict), ('small_sets', _picked)):
        content = json.loads((ROOT / f'results/{name}.json').read_text())
        summarize.draw(choose(content), images / f'{name}.png')


def main() -> None:
    if sys.argv[1:]:
        sys.exit(f'usage: python tools/update_docs.py\n\n{__doc__}')
    pages = updated_pages()
    for page, text in pages.items():
        (ROOT / page).write_text(text)
    redraw(pages)


if __name__ == '__main__':
    main()
