"""Tables of what benchmarks/grid.py has trained: mean ± standard deviation over the seeds."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.formats import table
from benchmarks.methods import label

BACKBONES = ('vit-tiny', 'efficientnet-lite0')  # those that are named beside the data set
# Task or data set as in the config's name, the metric that is shown, and the factor that makes it a percentage.
METRICS = {
    'camvid': ('mIoU', 1),
    'bccd': ('pascal_voc/mAP', 100),
    'nuclei': ('coco/segm_mAP', 100),
    'shapes-96x96': ('mIoU', 1),
    'shapes': ('coco/bbox_mAP', 100),
    'demo-sgd': ('mIoU', 1),
    'demo-branch-taps': ('mIoU', 1),
    'demo-block-taps': ('mIoU', 1),
    'demo-all-taps': ('mIoU', 1),
    'demo': ('mIoU', 1),
}

Groups = dict[str, dict[str, list[dict]]]


def group_runs(*contents: dict) -> Groups:
    """The runs of result files by data set and method, both in the order of the tables."""
    names = [name + backbone for name in METRICS for backbone in ('', *(f', {backbone}' for backbone in BACKBONES))]
    groups: Groups = {name: {} for name in names}
    for run in {name: run for content in contents for name, run in content['runs'].items()}.values():
        groups[dataset_of(run['config'])].setdefault(run['method'], []).append(run)
    return {name: dict(sorted(methods.items(), key=_order)) for name, methods in groups.items() if methods}


def _order(item: tuple[str, list[dict]]) -> tuple:
    """Frozen first, full last, the others by their trained parameters, E³VA's variants together."""
    method, runs = item
    return (method == 'full') - (method == 'frozen'), method.startswith('e3va'), trained_parameters(runs[0]), method


def with_more_seeds(groups: Groups) -> Groups:
    """Those methods that have more seeds than three on a data set."""
    return {
        name: {method: runs for method, runs in methods.items() if max(run['seed'] for run in runs) > 2}
        for name, methods in groups.items()
    }


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


def mean_and_spread(dataset: str, runs: list[dict]) -> tuple[float, float]:
    """Mean and standard deviation (0 of a single run) over the seeds.

    Raises:
        ValueError: the runs are at several learning rates.
    """
    if len({run.get('learning_rate') for run in runs}) > 1:
        raise ValueError(f'{runs[0]["method"]} on {dataset} has several learning rates: keep the chosen one')
    values = values_of(dataset, runs)
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def format_mean(dataset: str, runs: list[dict]) -> str:
    mean, spread = mean_and_spread(dataset, runs)
    return f'{mean:.1f} ± {spread:.1f}' if len(runs) > 1 else f'{mean:.1f}'


def format_runs(groups: Groups) -> str:
    """A row a data set and method (and learning rate, if there are several)."""
    rows = []
    for dataset, methods in groups.items():
        metric = metric_of(dataset)[0].split('/')[-1]
        for method, runs in methods.items():
            by_rate = runs_by_rate(runs)
            for rate, group in by_rate.items():
                name = label(method) + (f', rate {rate:g}' if len(by_rate) > 1 else '')
                value = f'{metric} {format_mean(dataset, group)}'
                checkpoint = f'{group[0]["report"]["checkpoint_bytes"] / 2**20:.0f} MiB'
                size, memory = f'{trained_parameters(group[0]):,}', f'{peak_memory(group):.0f} MiB'
                rows.append((dataset, name, value, len(group), size, memory, checkpoint))
    titles = ('data set', 'method', 'metric (%)', 'runs', 'trained in the backbone', 'peak memory', 'checkpoint')
    return table(titles, rows)


def runs_by_rate(runs: list[dict]) -> dict[float | None, list[dict]]:
    by_rate: dict[float | None, list[dict]] = {}
    for run in sorted(runs, key=lambda run: run.get('learning_rate') or 0):
        by_rate.setdefault(run.get('learning_rate'), []).append(run)
    return by_rate


def lead(dataset: str, runs: list[dict], others: list[dict]) -> tuple[float, float]:
    """The mean lead over others on the same seeds and folds, and its standard error."""
    own, other = (
        {(run['seed'], run.get('fold')): values_of(dataset, [run])[0] for run in group} for group in (runs, others)
    )
    leads = [own[key] - other[key] for key in own.keys() & other.keys()]
    return statistics.mean(leads), statistics.stdev(leads) / len(leads) ** 0.5
