#!/usr/bin/env python
"""Makes Markdown tables (printed) and plots of a result file from tools/benchmark.py or benchmark_steps.py."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

MARKERS = 'osD^vPX*<>'


def load_rows(path: str | Path) -> list[dict]:
    """A row a case: its settings, and medians over its runs."""
    rows = []
    for case in json.loads(Path(path).read_text())['cases'].values():
        runs = [run for run in case['runs'] if not run.get('out_of_memory')]
        if runs:
            keys = [key for key in runs[0] if key not in ('phases', 'most_time')]
            row = {**case, **{key: _median(runs, key) for key in keys}, 'runs': runs}
            if 'most_time' in runs[0]:
                row['kernel_seconds'] = statistics.median(map(_kernel_seconds, runs))
            rows.append(row)
        elif case['runs']:
            rows.append({**case, 'batch_size': 0})
    return rows


def _median(runs: list[dict], key: str):
    values = [run[key] for run in runs if key in run]
    if isinstance(values[0], list):
        return [statistics.median(column) for column in zip(*values)]
    # Of an even number of batches, one that has been measured.
    return statistics.median_low(values) if key == 'batch_size' else statistics.median(values)


def _kernel_seconds(run: dict) -> float:
    """What a step's kernels take, without copies from pageable memory, whose time is the processor's."""
    total, *rest = run['most_time']
    return total['seconds'] - sum(
        kernel['seconds'] for kernel in rest if kernel['name'].startswith('Memcpy HtoD (Page')
    )


def group_rows(rows: list[dict], *keys: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(_hashable(row[key]) for key in keys), []).append(row)
    return groups


def _hashable(value):
    return tuple(value) if isinstance(value, list) else value


def _images(row: dict) -> str:
    return 'real images' if row['data'] == 'real' else '×'.join(map(str, row['image_size']))


def format_tables(rows: list[dict]) -> str:
    """A table a model, image size, precision, batch size and memory cap; ratios are to its rows full and frozen."""
    parts = []
    keys = ('model', 'image_size', 'data', 'precision', 'batch_size', 'memory_cap', 'device')
    for (model, _, _, precision, batch, cap, device), group in group_rows(rows, *keys).items():
        if not batch:
            parts.append('\n'.join(f'{model}, {row["method"]}: does not train under {cap} GiB' for row in group))
            continue
        title = (
            f'**{model}, {_images(group[0])}, batch {batch}, {precision}** ({device}{f", {cap} GiB" if cap else ""})'
        )
        parts.append(f'{title}\n\n{format_table(group)}')
    return '\n\n'.join(parts)


def format_table(group: list[dict]) -> str:
    """A row a method; all of one model, image size, precision and batch size."""
    by_method = {row['method']: row for row in group}
    lines = [
        '| method | peak memory | of full | of frozen | kept in backbone | step (quartiles) | of full | of frozen |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for row in group:
        memory = [_ratio(row, by_method.get(name), 'peak_memory_mib') for name in ('full', 'frozen')]
        time = [_ratio(row, by_method.get(name), 'step_seconds') for name in ('full', 'frozen')]
        low, high = (1000 * seconds for seconds in row['step_seconds_quartiles'])
        lines.append(
            f'| {row["method"]} | {row["peak_memory_mib"]:.0f} MiB | {memory[0]} | {memory[1]} | '
            f'{row["saved_in_backbone_mib"]:.1f} MiB | {1000 * row["step_seconds"]:.0f} ms ({low:.0f}–{high:.0f}) | '
            f'{time[0]} | {time[1]} |'
        )
    return '\n'.join(lines)


def _ratio(row: dict, reference: dict | None, key: str) -> str:
    return f'{row[key] / reference[key]:.2f}' if reference else ''


def format_phases(rows: list[dict]) -> str:
    """Where the time of a step goes, in milliseconds; a row a case.

    Phases are timed with a synchronisation after each, so their sum may exceed the step. ``kernels`` is what all
    kernels of a step take (of profiled cases): where the step takes longer, it waits for the CPU.
    """
    names = ('frozen_forward', 'highway', 'backbone_forward', 'neck_and_head', 'backward', 'optimizer')
    profiled = any('most_time' in row['runs'][0] for row in rows)
    titles = [name.replace('_', ' ') for name in names] + ['kernels'] * profiled
    lines = ['| case | ' + ' | '.join(titles) + ' |', '|---' * (len(titles) + 1) + '|']
    for row in rows:
        cells = []
        for name in names:
            seconds = [run['phases'][name]['seconds'] for run in row['runs'] if name in run.get('phases', {})]
            cells.append(f'{1000 * statistics.median(seconds):.0f}' if seconds else '')
        if profiled:
            kernels = [run['most_time'][0]['seconds'] for run in row['runs'] if 'most_time' in run]
            cells.append(f'{1000 * statistics.median(kernels):.0f}' if kernels else '')
        precision = '' if row['precision'] == 'fp32' else f'{row["precision"]}, '
        case = f'{row["model"]}, {_images(row)}, batch {row["batch_size"]}, {precision}{row["method"]}'
        lines.append(f'| {case} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def format_steps(rows: list[dict]) -> str:
    """What tools/benchmark_steps.py has measured; a row a case, with quartiles over the rounds."""
    lines = ['| | | step | of the first |', '|---' * 4 + '|']
    for row in rows:
        low, high = row['of_first_quartiles']
        ratio = f'{row["of_first"]:.2f} ({low:.2f}–{high:.2f})' if row['of_first'] != 1 else '1'
        lines.append(f'| {row["model"]} | {row["method"]} | {1000 * row["step_seconds"]:.0f} ms | {ratio} |')
    return '\n'.join(lines)


def draw_bars(rows: list[dict], target: Path) -> None:
    """Memory, bytes kept and time, a bar a method."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 1 + 0.32 * len(rows)), layout='constrained', sharey=True)
    for axis, (label, unit, key) in zip(axes, [*_memory_panels(rows), ('step time (s)', 1, 'step_seconds')]):
        values = [row[key] / unit for row in rows]
        bars = axis.barh([row['method'] for row in rows], values, color='0.75', edgecolor='black')
        axis.bar_label(
            bars, fmt=lambda value: f'{value:.0f}' if value >= 100 else f'{value:.3g}', padding=3, fontsize=9
        )
        axis.set_xlabel(label)
        axis.xaxis.set_major_locator(MaxNLocator(5))
        axis.margins(x=0.2)
    axes[0].invert_yaxis()
    figure.suptitle(f'{rows[0]["model"]}, {_images(rows[0])}, batch {rows[0]["batch_size"]}, {rows[0]["precision"]}')
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _memory_panels(rows: list[dict]) -> list[tuple[str, int, str]]:
    """Label, unit in MiB and key of the two kinds of memory."""
    unit, name = (1024, 'GiB') if max(row['peak_memory_mib'] for row in rows) >= 10 * 1024 else (1, 'MiB')
    peak = 'peak memory of the process' if 'cpu' in rows[0]['device'] else 'peak memory'
    return [
        (f'{peak} ({name})', unit, 'peak_memory_mib'),
        (f'kept in the backbone for backward ({name})', unit, 'saved_in_backbone_mib'),
    ]


def draw_curves(rows: list[dict], over: str, target: Path) -> None:
    """Memory, bytes kept, and throughput against the batch or the image size, of each method with several."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), layout='constrained')
    panels = [*_memory_panels(rows), ('images/s', 1, 'images_per_second')]
    series = [(method, group) for (method,), group in group_rows(rows, 'method').items() if len(group) > 1]
    for number, (method, group) in enumerate(series):
        points = sorted(group, key=lambda row: _position(row, over))
        positions = [_position(row, over) for row in points]
        for axis, (_, unit, key) in zip(axes, panels):
            values = [row[key] / unit for row in points]
            axis.plot(positions, values, marker=MARKERS[number], label=method, color='black',
                      linestyle=('-', '--', ':', '-.')[number % 4], markerfacecolor='white')  # fmt: skip
    for axis, (label, *_) in zip(axes, panels):
        axis.set_xlabel('batch size' if over == 'batch_size' else 'image size (megapixels)')
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4)
    figure.suptitle(f'{rows[0]["model"]}, {rows[0]["precision"]}')
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _position(row: dict, over: str) -> float:
    return row[over] if over == 'batch_size' else row['image_size'][0] * row['image_size'][1] / 1e6


def draw(rows: list[dict], folder: Path, prefix: str) -> list[Path]:
    """Bars for each setting of models with one image size, curves for models with several batch or image sizes."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in rows if row['batch_size']]
    drawn = []
    for (model, _, *rest), group in group_rows(rows, 'model', 'image_size', 'precision', 'batch_size').items():
        if len({row['image_size'][0] for row in rows if row['model'] == model}) == 1:
            name = f'{prefix}_{model.replace(" ", "_")}' + ''.join(f'_{part}' for part in rest)
            drawn.append(folder / f'{name}.png')
            draw_bars(group, drawn[-1])
    for over, fixed in (('batch_size', 'image_size'), ('image_size', 'batch_size')):
        for (model, *_), group in group_rows(rows, 'model', 'precision', fixed).items():
            if len({_position(row, over) for row in group}) > 1:
                drawn.append(folder / f'{prefix}_{over}_{model.replace(" ", "_")}.png')
                draw_curves(group, over, drawn[-1])
    return drawn


def of_steps(rows: list[dict]) -> bool:
    """Whether tools/benchmark_steps.py has measured them."""
    return 'of_first' in rows[0]


def report(path: str | Path) -> str:
    """All tables of a result file, as Markdown."""
    rows = load_rows(path)
    if of_steps(rows):
        return format_steps(rows)
    phases = format_phases([row for row in rows if row['batch_size']])
    return f'{format_tables(rows)}\n\nWhere the time of a step goes (ms):\n\n{phases}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('results', help='JSON file from tools/benchmark.py')
    parser.add_argument('--plots', metavar='FOLDER', help='also draw plots into this folder')
    args = parser.parse_args()
    rows = load_rows(args.results)
    if args.plots and of_steps(rows):
        parser.error('--plots: there are none of tools/benchmark_steps.py')
    print(report(args.results))
    if args.plots:
        for path in draw(rows, Path(args.plots), Path(args.results).stem):
            print(f'\n{path}')


if __name__ == '__main__':
    main()
