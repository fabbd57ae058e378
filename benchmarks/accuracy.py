#!/usr/bin/env python
"""Prints the Markdown table of a result file from tools/run_grid.py: mean ± standard deviation over the seeds."""

import argparse
import itertools
import json
import statistics
from collections.abc import Collection
from pathlib import Path

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from scipy.optimize import isotonic_regression

from benchmarks.methods import without_rates

BACKBONES = ('vit-tiny', 'efficientnet-lite0')  # those that are named beside the data set
# Task or data set as in the config's name, the metric that is shown, and the factor that makes it a percentage.
METRICS = {
    'camvid': ('mIoU', 1),
    'bccd': ('pascal_voc/mAP', 100),
    'nuclei': ('coco/segm_mAP', 100),
    'shapes-96x96': ('mIoU', 1),
    'shapes': ('coco/bbox_mAP', 100),
}
NAMES = {'e3va': 'E³VA'}
# Twelve that are told apart when printed; E³VA and its variants have them again, filled with grey.
MARKERS = 'osD^vP*<>dpX'


def group_runs(content: dict) -> dict[str, dict[str, list[dict]]]:
    """The runs by data set and method, both in the order of the file's methods."""
    names = [name + backbone for name in METRICS for backbone in ('', *(f', {backbone}' for backbone in BACKBONES))]
    groups: dict[str, dict[str, list[dict]]] = {name: {} for name in names}
    for run in content['runs'].values():
        groups[dataset_of(run['config'])].setdefault(run['method'], []).append(run)
    return {dataset: methods for dataset, methods in groups.items() if methods}


def without_variants(content: dict, kept: Collection[str]) -> dict:
    """What a result file holds, but of the variants of E³VA only ``kept``."""
    runs = content['runs'].items()
    shown = {name: run for name, run in runs if not run['method'].startswith('e3va+') or run['method'] in kept}
    return {**content, 'runs': shown}


def dataset_of(config: str) -> str:
    """The data set's name in the tables, with the backbone's where it is another than Swin-nano."""
    stem = Path(config).stem
    dataset = next(name for name in METRICS if stem.split('_')[-1].startswith(name))
    return dataset + next((f', {name}' for name in BACKBONES if name in stem), '')


def metric_of(dataset: str) -> tuple[str, float]:
    return METRICS[dataset.partition(',')[0]]


def values_of(dataset: str, runs: list[dict]) -> list[float]:
    metric, scale = metric_of(dataset)
    # A detector without a single detection gets no metrics at all from mmdet.
    return [scale * run['report']['metrics'].get(metric, 0.0) for run in runs]


def peak_memory(runs: list[dict]) -> float:
    return statistics.median(run['report']['peak_memory_mib'] for run in runs)


def trained_parameters(run: dict) -> int:
    parts = run['report']['parameters']
    return sum(parts[part]['trainable'] for part in ('backbone', 'highway') if part in parts)


def summarize(content: dict, alone: dict[tuple[str, str], float] | None = None) -> str:
    """The table as text; a row a data set and method (and learning rate, if there are several), with its seeds.

    Args:
        content: of the result file.
        alone: seconds of a step by data set and method, for runs that shared the device, whose own say nothing.
    """
    lines = [
        '| data set | method | metric (%) | seeds | trained in the backbone | peak memory | step | checkpoint |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for dataset, methods in group_runs(content).items():
        for method, runs in sorted(methods.items(), key=_order):
            by_rate: dict[float | None, list[dict]] = {}
            for run in runs:
                by_rate.setdefault(run.get('learning_rate'), []).append(run)
            for rate, group in sorted(by_rate.items(), key=lambda item: item[0] or 0):
                label = NAMES.get(method, method) + (f', rate {rate:g}' if rate and len(by_rate) > 1 else '')
                seconds = _step_seconds(group) or (alone or {}).get((dataset, without_rates(method)))
                lines.append(_row(dataset, label, group, seconds))
    return '\n'.join(lines)


def pivot(content: dict) -> str:
    """The table as text; a row a method, and a column a data set with the metric and the peak memory."""
    groups = group_runs(content)
    titles = [f'{dataset}: {metric_of(dataset)[0].split("/")[-1]} (%), memory' for dataset in groups]
    lines = ['| method | trained in the backbone | ' + ' | '.join(titles) + ' |', '|---' * (2 + len(groups)) + '|']
    for method, runs in _ordered(groups).items():
        cells = [_cell(dataset, methods[method]) if method in methods else '' for dataset, methods in groups.items()]
        lines.append(f'| {NAMES.get(method, method)} | {trained_parameters(runs[0]):,} | ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def _cell(dataset: str, runs: list[dict]) -> str:
    return f'{_format_mean(dataset, runs)}, {peak_memory(runs):.0f} MiB'


def mean_and_spread(dataset: str, runs: list[dict]) -> tuple[float, float]:
    """Mean and standard deviation (0 of a single run) over the seeds.

    Raises:
        ValueError: the runs are at several learning rates.
    """
    if len({run.get('learning_rate') for run in runs}) > 1:
        raise ValueError(f'{runs[0]["method"]} on {dataset} has several learning rates: keep the chosen one')
    values = values_of(dataset, runs)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def _format_mean(dataset: str, runs: list[dict]) -> str:
    mean, spread = mean_and_spread(dataset, runs)
    return f'{mean:.1f} ± {spread:.1f}' if len(runs) > 1 else f'{mean:.1f}'


def _ordered(groups: dict[str, dict[str, list[dict]]]) -> dict[str, list[dict]]:
    """The methods of all data sets in the order of the tables, each with its runs on one of them."""
    return dict(sorted((item for methods in groups.values() for item in methods.items()), key=_order))


def _order(item: tuple[str, list[dict]]) -> tuple:
    """Frozen first, full last, the others by their trained parameters, E³VA's variants together."""
    method, runs = item
    return (method == 'full') - (method == 'frozen'), method.startswith('e3va'), trained_parameters(runs[0]), method


def _step_seconds(runs: list[dict]) -> float | None:
    """The median step of runs that each had the device to itself."""
    if any(run['jobs'] > 1 for run in runs):
        return None
    return statistics.median(run['report']['step_seconds_median'] for run in runs)


def _row(dataset: str, label: str, runs: list[dict], step_seconds: float | None) -> str:
    report = runs[0]['report']
    step = f'{1000 * step_seconds:.0f} ms' if step_seconds else ''
    return (
        f'| {dataset} | {label} | {metric_of(dataset)[0].split("/")[-1]} '
        f'{_format_mean(dataset, runs)} | {len(runs)} | {trained_parameters(runs[0]):,} | '
        f'{peak_memory(runs):.0f} MiB | {step} | {report["checkpoint_bytes"] / 2**20:.0f} MiB |'
    )


def draw(content: dict, target: Path) -> None:
    """Accuracy against training memory, a panel a data set and a point a method; those of equal memory side by side."""
    groups = group_runs(content)
    styles = _styles(list(_ordered(groups)))
    figure, axes = plt.subplots(1, len(groups), figsize=(6 * len(groups), 5), layout='constrained', squeeze=False)
    for axis, (dataset, methods) in zip(axes[0], groups.items()):
        places = _side_by_side({method: peak_memory(runs) for method, runs in methods.items()})
        for method, runs in sorted(methods.items(), key=_order):
            axis.errorbar(
                places[method],
                *mean_and_spread(dataset, runs),
                **styles[method],
                label=NAMES.get(method, method),
                linestyle='none',
                color='black',
                markersize=7,
                capsize=3,
            )
        axis.set_title(dataset)
        axis.set_xlabel(f'peak memory in training (MiB, {runs[0]["report"]["peak_memory_kind"]})')
        axis.set_ylabel(f'{metric_of(dataset)[0].split("/")[-1]} (%)')
        axis.grid(alpha=0.3)
    # Below the panels, where it hides no point; a method that is in several panels once.
    entries = {name: entry for axis in axes[0] for entry, name in zip(*axis.get_legend_handles_labels())}
    names = [NAMES.get(method, method) for method in styles]
    figure.legend(
        [entries[name] for name in names], names, loc='outside lower center', ncols=2 * len(groups), fontsize=9
    )
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _styles(methods: list[str]) -> dict[str, dict[str, str]]:
    """A marker and its fill for each method, the same in all panels."""
    variants = [method for method in methods if method.startswith('e3va')]
    others = [method for method in methods if method not in variants]
    styles = {}
    for family, fill in ((others, 'white'), (variants, '0.6')):
        for method, marker in zip(family, itertools.cycle(MARKERS)):
            styles[method] = dict(marker=marker, markerfacecolor=fill)
    if 'full' in styles:
        styles['full']['markerfacecolor'] = 'black'
    return styles


def _side_by_side(places: dict[str, float]) -> dict[str, float]:
    """The nearest places with at least a sixtieth of the range between neighbours, so that equal ones stay centred."""
    methods = sorted(places, key=places.get)
    exact = np.array([places[method] for method in methods])
    distances = (exact[-1] - exact[0]) / 60 * np.arange(len(exact))
    return dict(zip(methods, (isotonic_regression(exact - distances).x + distances).tolist()))


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('results', nargs='?', default='results/small_sets.json')
    parser.add_argument('--plot', help='also draw accuracy against training memory into this file')
    args = parser.parse_args()
    loaded = json.loads(Path(args.results).read_text())
    print(summarize(loaded))
    if args.plot:
        draw(loaded, Path(args.plot))
