#!/usr/bin/env python
"""Trains a grid of data sets, methods and seeds, several at a time, and collects the results in one JSON file.

Runs that are already in the file are not repeated, so an interrupted grid goes on where it stopped.
"""

import argparse
import itertools
import json
import threading
from pathlib import Path

from experiments import ROOT, Run, provenance, run_all, shorten
from held_out import FOLDS, hold_out, ranked_rates
from method_specs import METHODS_HELP, cfg_options, config_prefix
from summarize import dataset_of

DATASETS = {
    'camvid': 'configs/camvid/{}_upernet_1xb16-600_camvid-352x480.py',
    'bccd': 'configs/bccd/retinanet_{}_fpn_1xb8-400_bccd.py',
    'nuclei': 'configs/nuclei/mask-rcnn_{}_fpn_1xb8-300_nuclei.py',
    'shapes-seg': 'configs/shapes/{}_upernet_1xb8-600_shapes-96x96.py',
    'shapes-det': 'configs/shapes/retinanet_{}_fpn_1xb8-800_shapes.py',
}
BACKBONES = ('swin-nano', 'vit-tiny', 'efficientnet-lite0')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--datasets', nargs='+', choices=DATASETS, default=['camvid', 'bccd', 'nuclei'])
    parser.add_argument('--methods', nargs='+', default=['frozen', 'e3va', 'full'], help=METHODS_HELP)
    parser.add_argument(
        '--backbones', nargs='+', choices=BACKBONES, default=['swin-nano'], help='others: not on shapes'
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument(
        '--learning-rates', nargs='+', type=float, help="run each method at each; default: the config's"
    )
    parser.add_argument(
        '--held-out',
        action='store_true',
        help='validate on the last fifth of the training images, to choose by (use an --out of its own)',
    )
    parser.add_argument(
        '--folds', nargs='+', type=int, choices=FOLDS, help='with --held-out: on each of these fifths; 4 is the last'
    )
    parser.add_argument(
        '--rates-from', metavar='JSON', help="each method's best learning rate in this result of a grid of rates"
    )
    parser.add_argument(
        '--candidates', type=int, default=1, help='with --rates-from: that many of the best, to choose by more seeds'
    )
    parser.add_argument('--schedule', type=float, default=1.0, help="share of the config's iterations to train for")
    parser.add_argument(
        '--jobs',
        type=int,
        default=1,
        help='runs at a time, spread over the GPUs; step times then include the contention',
    )
    parser.add_argument('--train-args', nargs='*', default=[], help='flags for tools/train.py, without their dashes')
    parser.add_argument('--cfg-options', nargs='+', default=[], help='overrides for all runs, as for tools/train.py')
    parser.add_argument('--work-dir', default='work_dirs/grid')
    parser.add_argument('--out', required=True, help='JSON file that collects the results')
    parser.add_argument('--time-limit', type=float, default=float('inf'), help='seconds; no run is started after them')
    parser.add_argument('--commit', help='recorded in the results; default: asked of git')
    return parser.parse_args()


def plan(args: argparse.Namespace) -> list[Run]:
    """Seed by seed, so that an unfinished grid has the same seeds of all methods."""
    flags = tuple(f'--{flag}' for flag in args.train_args)
    ranked = ranked_rates(json.loads(Path(args.rates_from).read_text())) if args.rates_from else {}
    runs = []
    for seed, dataset, backbone in itertools.product(args.seeds, args.datasets, args.backbones):
        for method in args.methods:
            config = DATASETS[dataset].format(config_prefix(method) + backbone)
            if not (ROOT / config).is_file():
                raise SystemExit(f'there is no config for this data set and backbone: {config}')
            options = (*args.cfg_options, *cfg_options(method), *shorten(config, args.schedule))
            rates = args.learning_rates or [None]
            if args.rates_from:
                rates = _ranked_rates(ranked, config, method)[: args.candidates]
            runs += [Run(config, method, seed, flags, options, rate) for rate in rates]
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
    args = parse_args()
    if args.learning_rates and args.rates_from:
        raise SystemExit('--learning-rates and --rates-from exclude one another')
    if args.folds and not args.held_out:
        raise SystemExit('--folds needs --held-out')
    out = Path(args.out)
    content = json.loads(out.read_text()) if out.is_file() else {'runs': {}}
    lock = threading.Lock()

    def collect(run: Run, result: dict) -> None:
        with lock:
            content['runs'][run.name] = {**result, **provenance(args.commit), 'jobs': args.jobs}
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(content, indent=1, sort_keys=True) + '\n')
        print(run.name, result['report']['metrics'], flush=True)

    missing = [run for run in plan(args) if run.name not in content['runs']]
    run_all(missing, Path(args.work_dir), args.jobs, collect, args.time_limit)
    left = [run.name for run in missing if run.name not in content['runs']]
    if left:
        raise SystemExit(f'--time-limit is over; {len(left)} of {len(missing)} runs have not been started')


if __name__ == '__main__':
    main()
