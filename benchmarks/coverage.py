#!/usr/bin/env python
"""Puts every stock config of the installed toolboxes through e3va_mm.tune, and its shrunk model through a step.

A config is loaded and tuned; its model, shrunk (coverage_models.py), is built, stock and tuned, and put through
the steps of coverage_trial.py on made-up data. Configs whose shrunk models are the same share one trial. Results go
into a JSON file as they come, and a restart goes on where it stopped.
"""

from __future__ import annotations

import argparse
import fnmatch
import gc
import hashlib
import json
import random
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import init_default_scope

if __name__ == '__main__':
    # In place of this folder, where libraries would find this file under the name of the package coverage.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import e3va_mm
from benchmarks.coverage_data import values_of
from benchmarks.coverage_models import image_sizes, shrink
from benchmarks.coverage_trial import Trial, attempt
from benchmarks.training import ROOT, provenance
from e3va_mm.compat import repair_text_detectors
from e3va_mm.named_configs import configs_of

TOOLBOXES = ('mmdet', 'mmseg')
RESULTS = ROOT / 'benchmarks/results/coverage.json'
BACKBONES = ('backbone', 'image_encoder')
# What of an optim_wrapper says at which rate a parameter trains; a few configs have none, as they are for tests alone.
RATES = ('optimizer', 'constructor', 'paramwise_cfg')
RATE = {'optimizer': {'type': 'SGD', 'lr': 0.01}, 'constructor': 'HighwayRatesConstructor'}


def stock_configs() -> list[str]:
    """The names of all stock configs, such as ``mmdet::atss/atss_r50_fpn_1x_coco.py``; of each folder in turn."""
    folders = defaultdict(list)
    for toolbox in TOOLBOXES:
        root = configs_of(toolbox)
        for path in sorted(root.rglob('*.py')):
            if '_base_' not in path.parts:
                folders[path.parent].append(f'{toolbox}::{path.relative_to(root)}')
    # What fails shows early, as configs of a folder are much alike.
    return in_turn(folders.values())


class StockConfig:
    """A stock config: loaded and tuned, its models shrunk.

    Attributes:
        record: what is known of it: ``backbone`` and ``model``, their types; ``trial``, the name of its shrunk models;
            ``fails_at`` and ``error``, where it can not be loaded or tuned. Of one without a model, nothing.
    """

    def __init__(self, name: str) -> None:
        self.toolbox, self.path = name.split('::')
        self.record = attempt(self.load)
        if self.record or not self.config.get('model'):
            return
        self.record = {'model': str(self.config.model.get('type')), 'backbone': backbone_of(self.config.model)}
        self.record.update(attempt(self.tune, self.shrink))

    def load(self) -> None:
        self.config = Config.fromfile(str(configs_of(self.toolbox) / self.path))
        if self.config.get('model') and self.config.get('data_preprocessor'):
            self.config.model.setdefault('data_preprocessor', self.config.data_preprocessor)  # as the runner does

    def tune(self) -> None:
        self.tuned = e3va_mm.tune(self.config, 'e3va')

    def shrink(self) -> None:
        self.models = {'stock': shrink(self.config, self.toolbox), 'e3va': shrink(self.tuned, self.toolbox)}
        self.record['trial'] = digest(self.models)
        optim_wrapper = self.tuned.get('optim_wrapper') or RATE
        self.optim_wrapper = {key: optim_wrapper[key] for key in RATES if key in optim_wrapper}
        # Base rates differ in nothing else.
        kind = {**self.optim_wrapper, 'optimizer': self.optim_wrapper['optimizer']['type']}
        self.rates_key = digest([self.models['e3va'], kind])

    def trial(self, name: str, pixels: int = 0) -> Trial:
        if self.toolbox == 'mmdet':
            repair_text_detectors()  # as tools/train.py does, of stock models too
        init_default_scope(self.config.get('default_scope') or self.toolbox)
        return Trial(self.models[name], self.toolbox, self.optim_wrapper, pixels)

    def put_to_trial(self, seconds: int) -> dict[str, dict]:
        """Of ``stock``, ``e3va`` and the wrapped backbone alone, where a trial ends, and its error, if it fails."""
        results = {}
        for pixels in image_sizes(self.models['stock']):
            trial = self.trial('stock', pixels)
            results['stock'] = {**attempt(*trial.stock_steps(), seconds=seconds), **trial.report, 'pixels': pixels}
            if results['stock'].get('fails_at') in (None, 'build'):
                break
        trial = self.trial('e3va', pixels)
        results['e3va'] = {**attempt(*trial.steps(), seconds=seconds), **trial.report}
        if 'error' in results['e3va']:
            results['wrapped'] = attempt(trial.wrap, seconds=seconds)
        return results

    def check_rates(self, seconds: int) -> dict[str, str]:
        tuned = self.trial('e3va')
        return attempt(tuned.build, tuned.rates, seconds=seconds)


def digest(node: Any) -> str:
    return hashlib.sha1(json.dumps(node, sort_keys=True, default=str).encode()).hexdigest()[:12]


def backbone_of(model: dict) -> str:
    """The type of a model's first backbone."""
    backbones = (value for key in BACKBONES for value in values_of(model, key))
    return next((str(value['type']) for value in backbones if isinstance(value, dict) and 'type' in value), 'none')


def spread_sample(records: dict[str, dict], number: int) -> list[str]:
    """As many names, in turn of each backbone of each toolbox, of the types of models in turn; always the same."""
    groups: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for name, record in sorted(records.items()):
        groups[name.split('::')[0], record.get('backbone')][record.get('model')].append(name)
    draw, queues = random.Random(0), []
    for models in groups.values():
        for names in models.values():
            draw.shuffle(names)
        queues.append(in_turn(models.values()))
    return list(in_turn(queues))[:number]


def in_turn(queues: Iterable[list]) -> list:
    """One of each queue, then a second of each that has one, and so on."""
    queues = [list(queue) for queue in queues]
    rounds = range(max(map(len, queues), default=0))
    return [queue[turn] for turn in rounds for queue in queues if turn < len(queue)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=RESULTS, help='JSON file of the results')
    parser.add_argument('--sample', type=int, metavar='N', help='only N, spread over backbones and types of models')
    parser.add_argument('--only', default='*', metavar='PATTERN', help='only configs of names such as mmdet::detr/*')
    parser.add_argument('--seconds', type=int, default=120, help='that a step of a trial may take')
    parser.add_argument('--redo', action='store_true', help='try again what has failed')
    args = parser.parse_args()
    torch.set_num_threads(1)
    MMLogger.get_instance('coverage', log_level='ERROR')
    results = Results(args.out)
    if args.redo:
        results.drop_failed(args.only)
    names = spread_sample(read(RESULTS)['configs'], args.sample) if args.sample else stock_configs()
    for name in fnmatch.filter(names, args.only):
        if name not in results.seen:
            results.add(name, StockConfig(name), args.seconds)


class Results:
    """The JSON file: ``configs``, ``trials`` by the models' name and, by model and optimizer, ``rates``."""

    def __init__(self, path: Path) -> None:
        empty = {'configs': {}, 'without_model': [], 'trials': {}, 'rates': {}}
        self.path, self.content = path, {**(read(path) if path.exists() else empty), **provenance()}

    @property
    def seen(self) -> set[str]:
        return {*self.content['configs'], *self.content['without_model']}

    def drop_failed(self, pattern: str) -> None:
        configs, trials, rates = (self.content[part] for part in ('configs', 'trials', 'rates'))
        failed = [name for name in fnmatch.filter(configs, pattern) if failures(configs[name], self.content)]
        for record in map(configs.pop, failed):
            trials.pop(record.get('trial'), None)
            rates.pop(record.get('rates'), None)

    def add(self, name: str, config: StockConfig, seconds: int) -> None:
        record, trials, rates = config.record, self.content['trials'], self.content['rates']
        if not record:
            self.content['without_model'].append(name)
        elif 'error' not in record:
            if record['trial'] not in trials:
                trials[record['trial']] = trial = config.put_to_trial(seconds)
                if trial['e3va'].get('fails_at') not in ('build', 'rates'):
                    rates[config.rates_key] = {}
            if config.rates_key not in rates:
                rates[config.rates_key] = config.check_rates(seconds)
            record['rates'] = config.rates_key
        if record:
            self.content['configs'][name] = record
        print(name, record and (failures(record, self.content) or 'passes'), flush=True)
        self.path.write_text(json.dumps(self.content, indent=1) + '\n')
        gc.collect()


def failures(record: dict, content: dict) -> dict[str, dict]:
    """What of a config fails: ``config`` (loaded, tuned), ``stock``, ``e3va``, ``wrapped``, ``rates``."""
    parts = {'config': record, **content['trials'].get(record.get('trial'), {})}
    parts['rates'] = content['rates'].get(record.get('rates'), {})
    return {name: part for name, part in parts.items() if 'error' in part}


def read(path: Path) -> dict:
    return json.loads(path.read_text())


if __name__ == '__main__':
    main()
