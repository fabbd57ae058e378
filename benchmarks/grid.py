#!/usr/bin/env python
"""Trains a grid of data sets, methods and seeds, several at a time, and collects the results in one JSON file.

Runs that are already in the file are not repeated, so an interrupted grid goes on where it stopped. At the end the
table of the file is printed. Options before a first ``--and`` are common to the grids that follow, which share jobs.
"""

import argparse
import itertools
import json
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.accuracy import dataset_of, format_runs, group_runs
from benchmarks.held_out import FOLDS, hold_out, ranked_rates
from benchmarks.methods import METHODS_HELP, cfg_options, config_prefix, tune_flags
from benchmarks.training import ROOT, Run, parse_parts, provenance, run_all, shorten

DATASETS = {
    'camvid': 'configs/camvid/{}_upernet_1xb16-600_camvid-352x480.py',
    'bccd': 'configs/bccd/retinanet_{}_fpn_1xb8-400_bccd.py',
    'nuclei': 'configs/nuclei/mask-rcnn_{}_fpn_1xb8-300_nuclei.py',
    'shapes-seg': 'configs/shapes/{}_upernet_1xb8-600_shapes-96x96.py',
    'shapes-det': 'configs/shapes/retinanet_{}_fpn_1xb8-800_shapes.py',
    # Of these there are stock configs alone, which `--tune` wraps.
    'camvid-segformer': 'configs/camvid/segformer_{}_1xb16-600_camvid-352x480.py',
    'bccd-faster-rcnn': 'configs/bccd/faster-rcnn_{}_fpn_1xb8-400_bccd.py',
    'nuclei-mask2former': 'configs/nuclei/mask2former_{}_1xb8-400_nuclei.py',
    # The images are those that demo/run.py writes.
    'demo': 'benchmarks/configs/fcn_{}_1xb4-240_demo.py',
    'demo-sgd': 'benchmarks/configs/fcn_{}_1xb4-240_demo-sgd.py',
    'demo-branch-taps': 'benchmarks/configs/fcn_{}_1xb4-240_demo-branch-taps.py',
    'demo-block-taps': 'benchmarks/configs/fcn_{}_1xb4-240_demo-block-taps.py',
    'demo-all-taps': 'benchmarks/configs/fcn_{}_1xb4-240_demo-all-taps.py',
}
BACKBONES = ('swin-nano', 'vit-tiny', 'efficientnet-lite0')


def parse_args() -> list[argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('--datasets', nargs='+', choices=DATASETS, default=['camvid', 'bccd', 'nuclei'])
    add('--methods', nargs='+', default=['frozen', 'e3va', 'full'], help=METHODS_HELP)
    add(
        '--backbones',
        nargs='+',
        choices=BACKBONES,
        default=['swin-nano'],
        help='others: not on shapes, and the only ones of other heads',
    )
    add('--seeds', nargs='+', type=int, default=[0, 1, 2])
    add('--learning-rates', nargs='+', type=float, help="run each method at each; default: the config's")
    add('--held-out', action='store_true', help='validate on a fifth of the training images, to choose by; own --out')
    add('--folds', nargs='+', type=int, choices=FOLDS, help='--held-out: on each of these fifths; default: the last')
    add('--rates-from', metavar='JSON', help="each method's best learning rate in this result of a grid of rates")
    add('--candidates', type=int, default=1, help='--rates-from: so many of the best, to choose by more seeds')
    add('--schedule', type=float, default=1.0, help="share of the config's iterations to train for")
    add('--jobs', type=int, default=1, help='runs at a time, spread over the GPUs')
    add('--train-args', nargs='*', default=[], help='flags for tools/train.py, without their dashes')
    add('--cfg-options', nargs='+', default=[], help='overrides for all runs, as for tools/train.py')
    add('--package', type=Path, default=ROOT, metavar='FOLDER', help='checkout whose tools, configs and data/ train')
    add('--work-dir', default='work_dirs/grid')
    add('--out', required=True, help='JSON file that collects the results')
    add('--time-limit', type=float, default=float('inf'), help='seconds; no run is started after them')
    add('--commit', help='recorded in the results; default: asked of git')
    parts = parse_parts(parser)
    for args in parts:
        if args.learning_rates and args.rates_from:
            parser.error('--learning-rates and --rates-from exclude one another')
        if args.folds and not args.held_out:
            parser.error('--folds needs --held-out')
    return parts


def plan(args: argparse.Namespace) -> list[Run]:
    """Seed by seed, so that an unfinished grid has the same seeds of all methods."""
    flags = tuple(f'--{flag}' for flag in args.train_args)
    ranked = ranked_rates(json.loads(Path(args.rates_from).read_text())) if args.rates_from else {}
    runs = []
    for seed, dataset, backbone in itertools.product(args.seeds, args.datasets, args.backbones):
        for method in args.methods:
            config = DATASETS[dataset].format(config_prefix(method) + backbone)
            tune = ()
            if not (ROOT / config).is_file():
                config, tune = DATASETS[dataset].format(backbone), tune_flags(method)
            if not (ROOT / config).is_file():
                raise SystemExit(f'there is no config for this data set and backbone: {config}')
            options = (*args.cfg_options, *cfg_options(method), *shorten(config, args.schedule))
            rates = args.learning_rates or [None]
            if args.rates_from:
                rates = _ranked_rates(ranked, config, method)[: args.candidates]
            runs += [Run(config, method, seed, (*flags, *tune), options, rate) for rate in rates]
    if not args.held_out:
        return runs
    folds = args.folds or [FOLDS[-1]]
    splits = {pair: tuple(hold_out(*pair)) for pair in itertools.product({run.config for run in runs}, folds)}
    return [
        run._replace(cfg_options=run.cfg_options + splits[run.config, fold], fold=fold if args.folds else None)
        for fold in folds
        for run in runs
    ]


def _ranked_rates(ranked: dict[tuple[str, str], list[float]], config: str, method: str) -> list[float]:
    """The method's own; else, for one with options, that of the method without them."""
    dataset = dataset_of(config)
    for name in (method, method.partition('+')[0]):
        if (dataset, name) in ranked:
            return ranked[dataset, name]
    raise SystemExit(f'--rates-from has no rate for {method} on {dataset}; it has {sorted(ranked)}')


def main() -> None:
    parts = parse_args()
    args, out = parts[0], Path(parts[0].out)
    content = json.loads(out.read_text()) if out.is_file() else {'runs': {}}
    lock = threading.Lock()

    def collect(run: Run, result: dict) -> None:
        with lock:
            content['runs'][run.name] = {**result, **provenance(args.commit), 'jobs': args.jobs}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(content, indent=1, sort_keys=True) + '\n')
        print(run.name, result['report']['metrics'], flush=True)

    missing = [run for run in itertools.chain(*map(plan, parts)) if run.name not in content['runs']]
    run_all(missing, Path(args.work_dir), args.jobs, collect, args.time_limit, args.package.resolve())
    left = [run.name for run in missing if run.name not in content['runs']]
    if left:
        raise SystemExit(f'--time-limit is over; {len(left)} of {len(missing)} runs have not been started')
    print(format_runs(group_runs(content)))


if __name__ == '__main__':
    main()
