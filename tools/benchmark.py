#!/usr/bin/env python
"""Memory and time of training steps: tasks, backbone sizes, methods, precisions and batch sizes in one JSON file.

Each case runs in a process of its own, and the repeats are interleaved: all cases once, then all again. Cases that are
already in the file are not repeated. ``tools/summarize_benchmark.py`` makes tables and plots of the file.

A method is a name with options appended: ``full+checkpointed`` (activation checkpointing), ``lora``,
``e3va+bf16+taps-float8``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from experiments import ROOT, provenance
from method_specs import METHODS_HELP, backbone_of
from mmengine.config import DictAction

TASKS = {
    'upernet': ('configs/ade20k/swin-{long}-*.py', (512, 512)),
    'cascade-mask-rcnn': ('configs/coco/cascade-mask-rcnn_swin-{short}-*.py', (800, 1344)),
    'retinanet': ('configs/voc/retinanet_swin-{short}-*.py', (800, 1344)),
}
SIZES = {'t': 'tiny', 's': 'small', 'b': 'base', 'l': 'large'}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_arguments(parser)
    parser.add_argument('--memory-cap', type=float, help='GiB that PyTorch may allocate (CUDA)')
    parser.add_argument('--profile', action='store_true', help='also list the kernels that take the most time')
    parser.add_argument('--jobs', type=int, default=1, help='processes; one measures, others load libraries')
    return parser.parse_args()


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which cases there are, and how long each is measured."""
    parser.add_argument('--out', required=True, help='JSON file that collects the results')
    parser.add_argument('--tasks', nargs='*', default=list(TASKS), choices=TASKS)
    parser.add_argument('--sizes', nargs='+', default=['t'], choices=SIZES, help='of the Swin backbone')
    parser.add_argument('--configs', nargs='*', default=[], help='stock configs to measure beside the tasks')
    parser.add_argument(
        '--methods', nargs='+', default=['full', 'full+checkpointed', 'frozen', 'e3va'], help=METHODS_HELP
    )
    parser.add_argument('--precisions', nargs='+', default=['fp32'], choices=('fp32', 'amp-fp16', 'amp-bf16'))
    parser.add_argument('--batch-sizes', nargs='+', type=_batch_size, default=[2], help="numbers, or 'largest'")
    parser.add_argument('--image-sizes', nargs='+', type=_image_size, help="HxW; default: the task's own")
    parser.add_argument(
        '--data', choices=('synthetic', 'real'), default='synthetic', help="real: the config's own data"
    )
    parser.add_argument('--steps', type=int, default=20, help='measured steps of a case')
    parser.add_argument('--warmup', type=int, default=5, help='steps before them')
    parser.add_argument('--repeats', type=int, default=1, help='times that each case is run')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, default={}, help='overrides of all configs')
    parser.add_argument('--time-limit', type=float, default=float('inf'), help='seconds; none is started after them')
    parser.add_argument('--commit', help='recorded in the results; default: asked of git')


def _batch_size(text: str) -> int | str:
    return text if text == 'largest' else int(text)


def _image_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition('x')
    return int(height), int(width or height)


def models(args: argparse.Namespace) -> list[tuple[str, str, tuple[int, int]]]:
    """Name, config and default image size of what is measured."""
    found = [(Path(config).stem, config, (512, 512)) for config in args.configs]
    for task, size in itertools.product(args.tasks, args.sizes):
        pattern, image_size = TASKS[task]
        (config,) = ROOT.glob(pattern.format(short=size, long=SIZES[size]))
        found.append((f'{task} swin-{size}', str(config), image_size))
    return found


def plan(args: argparse.Namespace) -> dict[str, dict]:
    """The cases by name."""
    cases = {}
    grid = itertools.product(models(args), args.precisions, args.image_sizes or [None], args.batch_sizes, args.methods)
    for (model, config, default_size), precision, image_size, batch_size, method in grid:
        height, width = image_size or default_size
        cap = f', {args.memory_cap} GiB' if args.memory_cap else ''
        cases[f'{model}, {height}x{width}, batch {batch_size}, {precision}, {method}, {args.data}{cap}'] = {
            'model': model,
            'config': config,
            'method': method,
            'backbone': backbone_of(method),
            'precision': precision,
            'batch_size': batch_size,
            'image_size': [height, width],
            'data': args.data,
            'memory_cap': args.memory_cap,
            'steps': args.steps,
            'warmup': args.warmup,
            'cfg_options': args.cfg_options,
            'profile': args.profile,
        }
    return cases


def run_case(case: dict, lock: str) -> dict:
    """The measurements of one case; ``{'error': ...}`` has the end of what the process printed.

    Args:
        case: see :func:`plan`.
        lock: a file; who holds its lock may use the device.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, target = Path(folder, 'case.json'), Path(folder, 'result.json')
        given.write_text(json.dumps({**case, 'lock': lock}))
        command = [sys.executable, str(ROOT / 'tools/benchmark_case.py'), str(given), str(target)]
        call = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if call.returncode:
            return {'error': call.stdout[-2000:]}
        return json.loads(target.read_text())


def main() -> None:
    args = parse_args()
    out = Path(args.out)
    cases = plan(args)
    content = load(out, cases)
    # Repeat by repeat, so that those of a case are spread over the whole measurement.
    missing = [
        name for repeat in range(args.repeats) for name in cases if len(content['cases'][name]['runs']) <= repeat
    ]
    failed, started = 0, time.monotonic()

    def run(name: str) -> dict | None:
        return None if time.monotonic() - started > args.time_limit else run_case(cases[name], lock.name)

    with tempfile.NamedTemporaryFile() as lock, ThreadPoolExecutor(args.jobs) as pool:
        for name, result in zip(missing, pool.map(run, missing)):
            if result is None:
                sys.exit('--time-limit is over; not all cases have been measured')
            print(f'{name}: {describe(result)}', flush=True)
            if 'error' in result:
                failed += 1
                continue
            content['cases'][name]['runs'].append(result)
            content['cases'][name].update(provenance(args.commit))
            save(content, out)
    if failed:
        sys.exit(f'{failed} cases failed; what ran is in {out}')


def load(out: Path, cases: dict[str, dict]) -> dict:
    """What the result file holds, and the cases that it does not have yet."""
    content = json.loads(out.read_text()) if out.is_file() else {'cases': {}}
    for name, case in cases.items():
        content['cases'].setdefault(name, {**case, 'config': str(Path(case['config']).name), 'runs': []})
    return content


def save(content: dict, out: Path) -> None:
    measured = {name: case for name, case in content['cases'].items() if case['runs']}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({'cases': measured}, indent=1) + '\n')


def describe(result: dict) -> str:
    if 'error' in result:
        return f'failed:\n{result["error"]}'
    if result.get('out_of_memory'):
        return f'batch {result["batch_size"]} does not fit'
    return f'{result["peak_memory_mib"]:.0f} MiB, {1000 * result["step_seconds"]:.1f} ms (batch {result["batch_size"]})'


if __name__ == '__main__':
    main()
