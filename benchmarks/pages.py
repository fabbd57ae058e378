"""Tables of pages for users: a row a method by the name that people call it, and few numbers a cell."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from benchmarks import cost_tables
from benchmarks.accuracy import (
    Groups,
    dataset_of,
    format_mean,
    group_runs,
    lead,
    peak_memory,
    trained_parameters,
    values_of,
    with_more_seeds,
)
from benchmarks.cost_tables import MODELS, load_rows
from benchmarks.formats import memory, milliseconds, span, table
from benchmarks.methods import label, without_rates

# The variants of E³VA with mixers, the second of which held-out images pick; detectors' highways have their own rate.
LIGHT, PICKED = 'e3va+rank4+mixer96', 'e3va+rank4+mixer96+graph1'
DETECTORS_RATE = '+rate10'
COSTS = ('full', 'lora', 'mona', 'frozen', 'e3va+bf16', 'e3va+bf16+taps-float8+sampled')
SETS = {'camvid': 'CamVid, mIoU', 'bccd': 'BCCD, mAP', 'nuclei': 'nuclei, mask AP'}
DEMO = ('method', 'nuclei found', 'wrong', 'mIoU', 'trained', 'peak memory', 'step', 'checkpoint')
SHARED = (
    'backbone, image',
    'tasks',
    'backbones: time',
    'memory',
    "time, of one task's",
    "of separate models'",
    "memory, of one task's",
    "of separate models'",
    "whole models: time, of separate ones'",
    "memory, of separate ones'",
)
# Of UPerNet: the families whose sizes are compared, and a model's name in results.
FAMILIES = {'swin': 'Swin', 'dinov3': 'DINOv3'}
BACKBONE = re.compile('(?:upernet )?(swin|dinov3)-([a-z0-9]+)')
SEQUENTIAL = ('adapter', 'lora', 'mona')


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def source_line(rows: list[dict], part: str) -> str:
    """The line below a table that says when, where and by which command its numbers were measured."""
    devices, dates = (' and '.join(dict.fromkeys(row[key] for row in rows)) for key in ('device', 'date'))
    return f'\n\nMeasured on {devices}, {dates}, by `benchmarks/reproduce.sh {part}`.'


def format_costs(amp: Path) -> str:
    """Peak memory and step of each task under ``--amp``; a row a method."""
    rows = load_rows(amp)
    cells = {
        (row['model'], row['method']): f'{memory(row["peak_memory_mib"])} / {milliseconds(row["step_seconds"])}'
        for row in rows
    }
    models = [model for model in MODELS if any(row['model'] == model for row in rows)]
    lines = [[label(method), *(cells[model, method] for model in models)] for method in COSTS]
    return table(['peak memory / step', *map(MODELS.get, models)], lines) + source_line(rows, 'amp')


def format_all_costs(amp: Path) -> str:
    """The same of all methods, with ratios to full fine-tuning and to the frozen backbone; a table a task."""
    rows = load_rows(amp)
    return cost_tables.format_costs(rows) + source_line(rows, 'amp')


def format_fits(fits: Path) -> str:
    rows = load_rows(fits)
    return cost_tables.format_fits(rows) + source_line(rows, fits.stem.removeprefix('fits_'))


def format_scaling(several: Path) -> str:
    """Steps of one and of several GPUs."""
    rows = load_rows(several)
    return cost_tables.format_scaling(rows) + source_line(rows, 'several')


def growth_rows(images: Path, *backbones: Path) -> tuple[list[dict], list[dict]]:
    """Memory and step by the size of images, and by that of the backbone: as far as measured, ``size``, MiB, seconds.

    Args:
        images: of one backbone a panel, at several sizes.
        backbones: files of several sizes of backbones at 512 × 512; of giants, the cost of the smallest batch.
    """
    by_image = [{**row, 'panel': model_name(row), 'size': row['image_size'][0]} for row in _costs(images)]
    by_backbone = []
    for row in (row for path in backbones for row in _costs(path)):
        match = BACKBONE.match(row['model'])
        if match and row['image_size'] == [512, 512]:
            by_backbone.append({**row, 'panel': f'UPerNet {FAMILIES[match[1]]}, 512²', 'size': match[2].upper()})
    return by_image, by_backbone


def model_name(row: dict) -> str:
    """Without the size of its images."""
    return cost_tables.model_of(row).partition(',')[0]


def _costs(path: Path) -> list[dict]:
    """Rows with ``peak_memory_mib`` and ``step_seconds``: what was out of memory has none."""
    rows = load_rows(path) if path.is_file() else []
    rows = [{**row, **row['runs'][0].get('cost', {})} for row in rows]
    return [row for row in rows if 'step_seconds' in row]


def format_latency(*paths: Path) -> str:
    """Milliseconds of an image, and the ratio to the stock model's; a table a device, a column an engine and part."""
    parts = []
    for found in map(read, filter(Path.is_file, paths)):
        rows = {(row['part'], row['engine'], row['variant']): row for row in found['rows']}
        columns, variants = ({key[place]: 0 for key in rows} for place in (slice(0, 2), 2))
        lines = [
            [variant, *('{median_ms:.3g} ms, × {ratio:.2f}'.format(**rows[(*column, variant)]) for column in columns)]
            for variant in variants
        ]
        titles = ['Swin-T', *(f'{part}, {engine}' for part, engine in columns)]
        threads = f'{found["threads"]} thread(s) of ' if found['device'].startswith('cpu') else ''
        source = f'{found["size"]}², batch 1, {threads}{found["device"]}, {found["date"]}'
        parts.append(f'{table(titles, lines)}\n\nMeasured at {source}, by `benchmarks/latency.py`; medians.')
    return '\n\n'.join(parts)


def demo_cells(row: dict) -> list[str]:
    """A row of the demo's results, under :data:`DEMO`."""
    return [
        row['method'],
        f'{row["found"]:,} of {row["nuclei"]:,} ({row["found"] / row["nuclei"]:.0%})',
        str(row['wrong']),
        f'{row["mIoU"]:.1f}',
        f'{row["trained"]:,}',
        memory(row['peak_memory_mib']),
        milliseconds(row['step_seconds']),
        f'{row["checkpoint_mib"]:.1f} MiB',
    ]


def shared_rows(path: Path) -> list[dict]:
    """What benchmarks/shared_pass.py has measured: a row a setting and number of tasks, with its backbones and models.

    Memory is the peak where that was measured, else that of the weights.
    """
    content, found = read(path), {}
    for row in content['rows']:
        key = (row['size'], *row['image_size'], row['method'], row['tasks'])
        found.setdefault(key, {})[row['part']] = row
    rows = []
    for (size, height, width, method, tasks), parts in found.items():
        one = found[size, height, width, method, 1]
        name = f'Swin-{size.upper()}, {height} × {width}, {label(method)}'
        values = {'size': name, 'tasks': tasks, 'device': content['device']}
        for part, row in parts.items():
            kind = 'peak_mib' if 'peak_mib' in row['shared'] else 'weights_mib'
            shared, separate = row['shared'][kind], row['separate'][kind]
            memories = {'memory': shared, 'memory_of_one': shared / one[part]['separate'][kind]}
            memories['memory_of_separate'] = shared / separate
            times = {key: row[f'shared_{key}'] for key in ('seconds', 'of_one', 'of_separate')}
            values[part] = {**memories, **times}
        rows.append(values)
    return rows


def format_shared(*paths: Path) -> str:
    """Time and memory of many tasks by one pass, of those of one task and of separate models; a table a device."""
    parts = []
    for path in filter(Path.is_file, paths):
        content, lines = read(path), []
        for row in shared_rows(path):
            own, whole = row['backbones'], row.get('models', {})
            cells = [f'{own[key]:.2f}' for key in ('of_one', 'of_separate', 'memory_of_one', 'memory_of_separate')]
            cells += [f'{whole[key]:.2f}' if whole else '' for key in ('of_separate', 'memory_of_separate')]
            lines.append([row['size'], row['tasks'], milliseconds(own['seconds']), memory(own['memory']), *cells])
        kind = 'peak' if 'peak_mib' in content['rows'][0]['shared'] else 'the weights'
        source = f'Measured on {content["device"]}, {content["date"]}; memory is {kind}.'
        parts.append(f'{table(SHARED, lines)}\n\n{source}')
    return '\n\n'.join(parts)


def format_demo(demo: Path) -> str:
    """What each training of the demo finds, and what it takes."""
    content = read(demo)
    source = f'Measured on two cores, {content["device"]}, {content["date"]}: {content["seconds"]} s in all.'
    return f'{table(DEMO, map(demo_cells, content["rows"]))}\n\n{source}'


def format_adapters(adapters: Path) -> str:
    """The published files, and what they reach as they are."""
    content = read(adapters)
    lines = [
        [f'[{row["adapter"]}]({row["adapter"]})', f'{row["bytes"] / 1e6:.1f} MB', f'mIoU {row["mIoU"]:.1f}']
        for row in content['rows']
    ]
    source = f'Measured on {content["device"]}, {content["date"]}, by `{content["command"]}`.'
    return f'{table(["file", "size", "on the validation images"], lines)}\n\n{source}'


def runs_of(groups: Groups, dataset: str, method: str) -> list[dict]:
    """The runs of a method on a data set, at the rate that the kind of task takes; none if it was not trained there."""
    methods = groups.get(dataset, {})
    return methods.get(method) or methods.get(method + DETECTORS_RATE, [])


def steps_of(path: Path) -> dict[tuple[str, str], dict]:
    """The steps in turn on real data, by data set and method."""
    return {(dataset_of(row['config']), row['method']): row for row in load_rows(path) if row['data'] == 'real'}


def format_packages(accuracy: Path) -> str:
    """What two checkouts reach at the same seed, on the small sets."""
    runs, lines = read(accuracy)['runs'], []
    packages = list(dict.fromkeys(run['package'] for run in runs.values()))[::-1]
    of_packages = [group_runs({'runs': {k: run for k, run in runs.items() if run['package'] == p}}) for p in packages]
    for data in SETS:
        for name in ('e3va', PICKED):
            values = (format_mean(data, runs_of(groups, data, name)) for groups in of_packages)
            lines.append([SETS[data], label(name), *values])
    return table(['', '', *packages], lines)


def format_methods(small_sets: Path, steps: Path) -> str:
    """All methods: what they train, reach and cost; memory in units of frozen's, steps in units of E³VA's."""
    groups, in_turn = group_runs(read(small_sets)), steps_of(steps)
    names = [name for name in groups['camvid'] if not name.startswith('e3va+') or name in (LIGHT, PICKED)]
    lines = []
    for name in names:
        runs = {data: runs_of(groups, data, name) for data in SETS}
        peaks = (peak_memory(own) / peak_memory(groups[data]['frozen']) for data, own in runs.items())
        time = (in_turn[data, name]['of_first'] for data in SETS)
        means = (format_mean(data, own) for data, own in runs.items())
        size = f'{trained_parameters(runs["camvid"][0]):,}'
        lines.append([label(name), size, *means, span(peaks), span(time)])
    titles = ['method', 'trained in the backbone', *SETS.values(), "memory, of frozen's", "step, of E³VA's"]
    return table(titles, lines)


def format_target(small_sets: Path, more_seeds: Path, steps: Path) -> str:
    """The lead of the variants with mixers over the best sequential method, and their memory and step of E³VA's."""
    three = group_runs(read(small_sets))
    nine = with_more_seeds(group_runs(read(small_sets), read(more_seeds)))
    in_turn, lines = steps_of(steps), []
    for data, methods in three.items():
        best = max(SEQUENTIAL, key=lambda method: statistics.mean(values_of(data, methods[method])))
        for name in (LIGHT, PICKED):
            pairs = ((runs_of(groups, data, name), groups[data][best]) for groups in (three, nine))
            leads = ('{:+.1f} ± {:.1f}'.format(*lead(data, *pair)) for pair in pairs)
            peak = peak_memory(runs_of(three, data, name)) / peak_memory(methods['e3va'])
            lines.append([data, label(name), *leads, f'{peak:.2f}', f'{in_turn[data, name]["of_first"]:.2f}'])
    return table(['data set', 'variant', 'lead, 3 seeds', 'lead, 9 seeds', 'memory', 'step'], lines)


def shown_in_plot(small_sets: Path) -> Groups:
    """All methods, and of the variants of E³VA those that tables for people have."""
    kept = {'e3va', LIGHT, PICKED}
    return {
        data: {name: runs for name, runs in methods.items() if without_rates(name) in kept or '+' not in name}
        for data, methods in group_runs(read(small_sets)).items()
    }
