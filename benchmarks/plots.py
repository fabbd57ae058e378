"""The plots of what benchmarks/grid.py has trained, and benchmarks/shared_pass.py and cost.py measured."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
from matplotlib.ticker import LogFormatter

from benchmarks.accuracy import Groups, mean_and_spread, metric_of, peak_memory
from benchmarks.methods import label, without_rates

MARKERS = 'osD^vP*<>dpX'


def draw_accuracy(groups: Groups, target: Path) -> None:
    """Accuracy against training memory, a panel a data set and a point a method; E³VA and its variants are grey."""
    names = dict.fromkeys(without_rates(method) for methods in groups.values() for method in methods)
    markers = {}
    for ours in (False, True):
        markers.update(zip([name for name in names if name.startswith('e3va') == ours], itertools.cycle(MARKERS)))
    figure, axes = plt.subplots(1, len(groups), figsize=(6 * len(groups), 5), layout='constrained', squeeze=False)
    for axis, (dataset, methods) in zip(axes[0], groups.items()):
        for method, runs in methods.items():
            name = without_rates(method)
            fill = 'black' if name == 'full' else '0.6' if name.startswith('e3va') else 'white'
            style = dict(marker=markers[name], markerfacecolor=fill, color='black', ls='none', ms=7, capsize=3)
            axis.errorbar(peak_memory(runs), *mean_and_spread(dataset, runs), label=label(name), **style)
        axis.set_title(dataset)
        axis.set_xlabel(f'peak memory in training (MiB, {runs[0]["report"]["peak_memory_kind"]})')
        axis.set_ylabel(f'{metric_of(dataset)[0].split("/")[-1]} (%)')
        axis.grid(alpha=0.3)
    entries = {name: entry for axis in axes[0] for entry, name in zip(*axis.get_legend_handles_labels())}
    # Below the panels, where it hides no point.
    figure.legend(entries.values(), entries, loc='outside lower center', ncols=2 * len(groups), fontsize=9)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw_shared(rows: list[dict], target: Path) -> None:
    """Time (above) and memory (below) of the backbones of many tasks, in units of one task's; a column a setting.

    Args:
        rows: see :func:`benchmarks.pages.shared_rows`; those of several files have their ``device``.
    """
    settings = list(dict.fromkeys((row['size'], row['device']) for row in rows))
    figure, axes = plt.subplots(
        2, len(settings), figsize=(4 * len(settings), 6.5), layout='constrained', squeeze=False, sharex=True
    )
    for column, setting in zip(axes.T, settings):
        own = [row for row in rows if (row['size'], row['device']) == setting]
        tasks = [row['tasks'] for row in own]
        for axis, name, prefix in zip(column, ('time', 'memory'), ('', 'memory_')):
            shared = [row['backbones'][f'{prefix}of_one'] for row in own]
            separate = [value / row['backbones'][f'{prefix}of_separate'] for value, row in zip(shared, own)]
            axis.plot(tasks, separate, marker='s', color='0.6', label='a pass each')
            axis.plot(tasks, shared, marker='o', color='black', label='one pass')
            axis.set_ylabel(f"backbones' {name}, of one task's")
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
        column[0].set_title('\n'.join(setting), fontsize=9)
        column[1].set_xlabel('tasks')
        column[1].set_xticks(tasks)
    axes[0, 0].legend(fontsize=9)
    figure.savefig(target, dpi=110)
    plt.close(figure)


def draw_growth(rows: list[dict], target: Path) -> None:
    """Peak memory (above) and step (below) by size, a line a method and a column a panel; both on logarithmic scales.

    A line ends where a size has not been measured.

    Args:
        rows: see :func:`benchmarks.pages.growth_rows`.
    """
    panels = list(dict.fromkeys(row['panel'] for row in rows))
    methods = list(dict.fromkeys(row['method'] for row in rows))
    figure, axes = plt.subplots(
        2, len(panels), figsize=(4.5 * len(panels), 6.5), layout='constrained', squeeze=False, sharey='row'
    )
    for column, panel in zip(axes.T, panels):
        own = [row for row in rows if row['panel'] == panel]
        sizes = list(dict.fromkeys(row['size'] for row in own))
        for axis, key, scale in zip(column, ('peak_memory_mib', 'step_seconds'), (1 / 1024, 1000)):
            for marker, method in zip(itertools.cycle(MARKERS), methods):
                values = {row['size']: scale * row[key] for row in own if row['method'] == method}
                points = [values.get(size, math.nan) for size in sizes]
                color = 'black' if method.startswith('e3va') else '0.6'
                axis.plot(points, marker=marker, color=color, label=label(method)) if values else None
            axis.set_yscale('log')
            axis.yaxis.set_major_formatter(LogFormatter())
            axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))
            axis.set_xticks(range(len(sizes)), sizes)
            axis.grid(alpha=0.3, which='both')
        column[0].set_title(panel, fontsize=9)
        column[1].set_xlabel('side of the images' if isinstance(sizes[0], int) else 'size of the backbone')
    axes[0, 0].set_ylabel('peak memory (GiB)')
    axes[1, 0].set_ylabel('step (ms)')
    axes[0, 0].legend(fontsize=8)
    figure.savefig(target, dpi=110)
    plt.close(figure)
