#!/usr/bin/env python
"""Memory and time of training steps: tasks, backbone sizes, methods, precisions and batch sizes in one JSON file.

What is measured: ``cost`` (the default), each case in a process of its own, or all sizes of a model's images
``--together``, which takes less time; ``in-turn``, a step of each method in turn
in one process, and the ratio to the first method in the same round, since processes differ in speed more than methods;
``fits``, the largest batch in the memory of each of ``--cards``, and the cost of the smallest; ``gradients``, what each
of several processes sends in a step. With ``--gpus`` steps are timed together, and in the same processes alone.

Repeats are interleaved: all cases once, then all again. Cases that are already in the file are not repeated. At the end
the tables of the file are printed. Checkouts are compared by ``--packages``. Options before a first ``--and`` are
common to the sets of options that follow, each of which has cases of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmengine.config import Config, DictAction

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cost_tables import group_rows, load_rows, report
from benchmarks.methods import METHODS_HELP, backbone_of
from benchmarks.training import ROOT, parse_parts, provenance, python_path
from e3va_mm.tune import find_config

TASKS = {
    'upernet': ('configs/ade20k/swin-{long}-*.py', (512, 512)),
    'cascade-mask-rcnn': ('configs/coco/cascade-mask-rcnn_swin-{short}-*.py', (800, 1344)),
    'retinanet': ('configs/voc/retinanet_swin-{short}-*.py', (800, 1344)),
}
SETTING = ('model', 'image_size', 'precision', 'batch_size', 'gpus')
BENCH = ('model', 'method', 'precision', 'gpus', 'package')
SIZES = {'t': 'tiny', 's': 'small', 'b': 'base', 'l': 'large'}


def parse_args() -> list[argparse.Namespace]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--out', required=True, help='JSON file that collects the results')
    add('--measure', choices=('cost', 'in-turn', 'fits', 'gradients'), default='cost')
    add('--tasks', nargs='*', default=list(TASKS), choices=TASKS)
    add('--sizes', nargs='+', default=['t'], choices=SIZES, help='of the Swin backbone')
    add('--configs', nargs='*', default=[], help='stock configs, mmdet::… among them, to measure beside the tasks')
    add('--methods', nargs='+', default=['full', 'full+checkpointed', 'frozen', 'e3va'], help=METHODS_HELP)
    add('--precisions', nargs='+', default=['fp32'], choices=('fp32', 'amp-fp16', 'amp-bf16'))
    add('--batch-sizes', nargs='+', type=int, default=[2])
    add('--image-sizes', nargs='+', type=_image_size, help="HxW; default: the task's own")
    add('--gpus', nargs='+', type=int, default=[1], help='that train together, each with a batch of its own')
    add('--data', choices=('synthetic', 'real'), default='synthetic', help="real: the config's own data")
    add('--packages', nargs='+', type=_labelled, help='LABEL=FOLDER: e3va_mm, and what is beside it; default: ours')
    add(
        '--together',
        action='store_true',
        help='batches of a model in one process; on a CPU, memory is the largest',
    )
    add('--steps', type=int, default=20, help='measured steps of a case')
    add('--warmup', type=int, default=5, help='steps before them')
    add('--repeats', type=int, default=1, help='times that each case is run')
    add('--cards', nargs='+', type=int, default=[8, 12, 16, 24, 48, 80], help='fits: memory of cards in GB')
    add('--most-images', type=int, default=32, help='fits: no larger batch is tried')
    add('--jobs', type=int, default=1, help='processes; one measures, others load libraries')
    add('--cfg-options', nargs='+', action=DictAction, default={}, help='overrides of all configs')
    add('--time-limit', type=float, default=float('inf'), help='seconds; none is started after them')
    add('--commit', help='recorded in the results; default: asked of git')
    parsed = parse_parts(parser)
    for args in parsed:
        if args.measure == 'in-turn' and args.packages:
            parser.error('--packages have processes of their own, and can not be measured --measure in-turn')
        if args.together and args.measure != 'cost':
            parser.error(f'--together is for --measure cost, not {args.measure}')
    return parsed


def _image_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition('x')
    return int(height), int(width or height)


def _labelled(text: str) -> tuple[str, str]:
    label, _, folder = text.partition('=')
    if not Path(folder, 'e3va_mm').is_dir():
        raise argparse.ArgumentTypeError(f'expected LABEL=FOLDER with e3va_mm in FOLDER, got {text}')
    return label, str(Path(folder).resolve())


def models(args: argparse.Namespace) -> list[tuple[str, str, tuple[int, int]]]:
    """Name, config and default image size of what is measured."""
    found = [(Path(config.partition('::')[2] or config).stem, config, (512, 512)) for config in args.configs]
    for task, size in itertools.product(args.tasks, args.sizes):
        pattern, image_size = TASKS[task]
        (config,) = ROOT.glob(pattern.format(short=size, long=SIZES[size]))
        found.append((f'{task} swin-{size}', str(config), image_size))
    return found


def plan(args: argparse.Namespace) -> dict[str, dict]:
    """The cases by name."""
    cases = {}
    batches = ['largest'] if args.measure == 'fits' else args.batch_sizes
    packages = args.packages or [(None, None)]
    sizes = args.image_sizes or [None]
    grid = itertools.product(models(args), args.precisions, sizes, batches, args.methods, packages, args.gpus)
    for (model, config, default_size), precision, image_size, batch, method, (label, folder), gpus in grid:
        height, width = image_size or default_size
        name = f'{model}, {height}x{width}, batch {batch}, {precision}, {method}, {args.data}'
        cases[name + (f', {label}' if label else '') + (f', {gpus} GPUs' if gpus > 1 else '')] = {
            'model': model,
            'config': config,
            'method': method,
            'backbone': backbone_of(method),
            'precision': precision,
            'batch_size': batch,
            'image_size': [height, width],
            'data': args.data,
            'package': label,
            'gpus': gpus,
            'folder': folder,
            **{key: getattr(args, key) for key in ('steps', 'warmup', 'cfg_options')},
            **({'cards': args.cards, 'most_images': args.most_images} if args.measure == 'fits' else {}),
        }
    return cases


def jobs_of(cases: dict[str, dict], measure: str, together: bool = False) -> list[list[str]]:
    """The names of the cases that a process measures: one, those of a model, or all methods of a setting in turn."""
    if measure != 'in-turn' and not together:
        return [[name] for name in cases]
    keys = SETTING if measure == 'in-turn' else BENCH
    groups = group_rows([{**case, 'name': name} for name, case in cases.items()], *keys)
    return [[case['name'] for case in group] for group in groups]


def run_job(measure: str, cases: list[dict], lock: str) -> list[dict] | str:
    """What was measured of each case, or the end of what the process printed if it failed.

    Args:
        cases: see :func:`plan`; those with a ``folder`` run with its ``e3va_mm``.
        lock: a file; who holds its lock may use the device.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, target, config = (Path(folder, name) for name in ('job.json', 'runs.json', 'config.py'))
        # Whole, because another checkout's package may not know how ours finds what a config is based on.
        Config.fromfile(find_config(cases[0]['config'])).dump(config)
        job = {'measure': measure, 'cases': [{**case, 'config': str(config)} for case in cases], 'lock': lock}
        given.write_text(json.dumps(job))
        # Our benchmarks with the case's packages, also where that is a checkout with benchmarks of its own.
        Path(folder, 'benchmarks').symlink_to(ROOT / 'benchmarks')
        packages, gpus = cases[0]['folder'] or ROOT, cases[0]['gpus']
        launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={gpus}'] if gpus > 1 else []
        call = subprocess.run(
            [sys.executable, *launcher, str(ROOT / 'benchmarks/measure.py'), str(given), str(target)],
            cwd=ROOT,
            env={**os.environ, 'PYTHONPATH': os.pathsep.join([folder, python_path(packages)])},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return json.loads(target.read_text()) if call.returncode == 0 else call.stdout[-6000:]


def main() -> None:
    parsed = parse_args()
    args = parsed[0]
    cases = {name: case for each in parsed for name, case in plan(each).items()}
    out, failed, started = Path(args.out), 0, time.monotonic()
    content = json.loads(out.read_text()) if out.is_file() else {'cases': {}}
    known = content['cases']
    other_cards = {name for name in cases.keys() & known if known[name].get('cards') != cases[name].get('cards')}
    counts = {name: 0 if name in other_cards else len(known.get(name, {}).get('runs', ())) for name in cases}
    jobs = jobs_of(cases, args.measure, args.together)
    missing = []
    for repeat, job in itertools.product(range(args.repeats), jobs):
        left = [name for name in job if counts[name] <= repeat]
        # A step in turn is in units of the first one's.
        missing += [job if args.measure == 'in-turn' else left] if left else []

    def run(job: list[str]) -> list[dict] | str | None:
        if time.monotonic() - started > args.time_limit:
            return None
        return run_job(args.measure, [cases[name] for name in job], lock.name)

    with tempfile.NamedTemporaryFile() as lock, ThreadPoolExecutor(args.jobs) as pool:
        for job, runs in zip(missing, pool.map(run, missing)):
            if runs is None:
                sys.exit('--time-limit is over; not all cases have been measured')
            if isinstance(runs, str):
                failed += 1
                print(f'{", ".join(job)} failed:\n{runs}', flush=True)
                continue
            for name, result in zip(job, runs):
                print(f'{name}: {result}', flush=True)
                if name in other_cards:
                    other_cards.remove(name)
                    del known[name]
                record(known, name, cases[name], result)
                known[name].update(provenance(args.commit))
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(content, indent=1) + '\n')
    if known:
        print(report(load_rows(out)))
    if failed:
        sys.exit(f'{failed} measurements failed; what ran is in {out}')


def record(known: dict[str, dict], name: str, case: dict, result: dict) -> None:
    """Adds a result to those of its case, which is known without folders: those of a machine say nothing to others."""
    config = case['config']
    public = {**case, 'config': config if '::' in config else Path(config).name, 'runs': []}
    del public['folder']
    known.setdefault(name, public)['runs'].append(result)


if __name__ == '__main__':
    main()
