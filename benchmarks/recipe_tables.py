"""Tables of the recipe: methods on all small sets and backbones, at the rates of the sets' configs and around them."""

from __future__ import annotations

import functools
import json
import math
import statistics
from collections.abc import Iterator
from pathlib import Path

from mmengine.config import Config

from benchmarks.accuracy import values_of
from benchmarks.formats import table
from benchmarks.grid import BACKBONES, DATASETS
from benchmarks.methods import label
from benchmarks.pages import SETS, source_line
from benchmarks.training import ROOT

SHORT = {'swin-nano': 'Swin', 'vit-tiny': 'ViT', 'efficientnet-lite0': 'EffNet'}
COMBINATIONS = [(dataset, backbone) for dataset in SETS for backbone in BACKBONES]
# Of the configs' rate; what is nearest on a logarithmic scale.
FACTORS = (1 / 3, 1, 3)
PAPER, RECOMMENDED = 'e3va', 'e3va+rank4+mixer96+ownrate'
SHOWN = ('frozen', 'lora', 'adapter', 'full', PAPER, RECOMMENDED)

# Of masks on nuclei: found at all, and with the right outline.
OVERLAPS = {'coco/segm_mAP_50': 'AP50', 'coco/segm_mAP_75': 'AP75'}

# By method and factor: by combination, a value a seed.
Values = dict[tuple[str, float], dict[tuple[str, str], dict[int, float]]]


def read_values(recipe: Path) -> Values:
    """The metrics, in per cent, of all runs of ``reproduce.sh recipe``."""
    found: Values = {}
    for method, factor, combination, run in _read(recipe):
        of_method = found.setdefault((method, factor), {})
        of_method.setdefault(combination, {})[run['seed']] = values_of(combination[0], [run])[0]
    return found


def _read(recipe: Path) -> Iterator[tuple[str, float, tuple[str, str], dict]]:
    """The runs, each with its method, its learning rate in units of the config's, its data set and backbone."""
    for run in json.loads(recipe.read_text())['runs'].values():
        dataset = Path(run['config']).parent.name
        backbone = next(name for name in BACKBONES if name in run['config'])
        ratio = run['learning_rate'] / own_rate(dataset, backbone)
        yield run['method'], min(FACTORS, key=lambda each: abs(math.log(ratio / each))), (dataset, backbone), run


@functools.cache
def own_rate(dataset: str, backbone: str) -> float:
    config = DATASETS[dataset].format(f'e3va-{backbone}')
    return Config.fromfile(ROOT / config).optim_wrapper.optimizer.lr


def means(of_method: dict[tuple[str, str], dict[int, float]]) -> dict[tuple[str, str], float]:
    return {combination: statistics.mean(seeds.values()) for combination, seeds in of_method.items()}


def lead(values: Values, method: str, other: str, factor: float = 1) -> tuple[float, float, int]:
    """Over another method on equal seeds of equal combinations: the mean lead, its standard error, how many pairs."""
    own, others = values[method, factor], values[other, factor]
    pairs = [
        own[combination][seed] - others[combination][seed]
        for combination in own.keys() & others.keys()
        for seed in own[combination].keys() & others[combination].keys()
    ]
    return statistics.mean(pairs), statistics.stdev(pairs) / len(pairs) ** 0.5, len(pairs)


def change(values: Values, method: str, factor: float) -> tuple[float, int]:
    """From the configs' rates to a factor of these, on equal seeds: the mean over combinations, and their number."""
    there, here = values.get((method, factor), {}), values[method, 1]
    differences = [
        [
            there[combination][seed] - here[combination][seed]
            for seed in there[combination].keys() & here[combination].keys()
        ]
        for combination in there.keys() & here.keys()
    ]
    changes = [statistics.mean(each) for each in differences if each]
    return (statistics.mean(changes), len(changes)) if changes else (math.nan, 0)


def _rows(values: Values, factor: float) -> list[str]:
    """The methods with all combinations at a factor, frozen first and full last, by their mean."""
    complete = [name for name, each in values if each == factor and len(values[name, factor]) == len(COMBINATIONS)]

    def order(method: str) -> tuple:
        return (method == 'full') - (method == 'frozen'), statistics.mean(means(values[method, factor]).values())

    return sorted(complete, key=order)


def format_recipe(recipe: Path) -> str:
    """Means of the seeds at the configs' rates; a row a method, a column a combination."""
    values, lines = read_values(recipe), []
    for method in _rows(values, 1):
        of_method = means(values[method, 1])
        cells = [f'{of_method[each]:.1f}' for each in COMBINATIONS]
        ahead = '{:+.1f} ± {:.1f} ({})'.format(*lead(values, method, PAPER)) if method != PAPER else ''
        lines.append([label(method), *cells, f'{statistics.mean(of_method.values()):.1f}', ahead])
    titles = [f'{SETS[dataset].partition(",")[0]}, {SHORT[backbone]}' for dataset, backbone in COMBINATIONS]
    return table(['method', *titles, 'mean', 'over E³VA (runs)'], lines)


def format_around(recipe: Path) -> str:
    """What other rates than the configs' change: a row a method, a column a factor."""
    values, factors = read_values(recipe), (min(FACTORS), max(FACTORS))

    def cell(method: str, factor: float) -> str:
        mean, number = change(values, method, factor)
        return f'{mean:+.1f} ({number})' if number else '–'

    lines = [[label(method), *(cell(method, factor) for factor in factors)] for method in SHOWN]
    return table(['method', 'rates / 3 (combinations)', 'rates × 3 (combinations)'], lines)


def format_recipe_means(recipe: Path) -> str:
    """Means over backbones and seeds, at the configs' rates; a row a method, a column a data set."""
    values, lines = read_values(recipe), []
    runs = sorted(json.loads(recipe.read_text())['runs'].values(), key=lambda run: run['date'])
    for method in SHOWN:
        of_method = means(values[method, 1])
        by_set = [statistics.mean(of_method[name, backbone] for backbone in BACKBONES) for name in SETS]
        lines.append([label(method), *(f'{mean:.1f}' for mean in [*by_set, statistics.mean(of_method.values())])])
    return table(['method', *SETS.values(), 'mean'], lines) + source_line(runs, 'recipe')


def format_outlines(recipe: Path) -> str:
    """Masks on nuclei that overlap by half and by three quarters, at the config's rate: means of the seeds."""
    found: dict[tuple, list[float]] = {}
    for method, factor, (dataset, backbone), run in _read(recipe):
        if factor == 1 and dataset == 'nuclei':
            for metric, name in OVERLAPS.items():
                found.setdefault((method, backbone, name), []).append(100 * run['report']['metrics'][metric])
    columns = [(backbone, name) for backbone in BACKBONES for name in OVERLAPS.values()]
    lines = []
    for method in SHOWN:
        cells = [f'{statistics.mean(found[(method, *column)]):.1f}' for column in columns]
        lines.append([label(method), *cells])
    return table(['method', *(f'{SHORT[backbone]}, {name}' for backbone, name in columns)], lines)
