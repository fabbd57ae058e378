#!/usr/bin/env python
"""Kills trainings at random moments, resumes them with --resume, and compares how they end with uninterrupted ones.

Each setting is trained without interruption, then again in a folder of its own, where it is killed (SIGKILL) and
resumed until it ends; the weights at the end must be the same to the bit. Last, a training saves to a disk that becomes
full, which takes the right to mount a tmpfs. On CPUs, with generated images; results go into a JSON file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.shapes import write_shapes
from benchmarks.training import ROOT, provenance
from e3va_mm.checkpoints.files import read_checkpoint

CONFIG = 'configs/shapes/e3va-swin-nano_upernet_1xb8-600_shapes-96x96.py'
SHORT = ['train_cfg.max_iters=16', 'train_cfg.val_interval=4', 'param_scheduler.1.end=32', 'randomness.seed=0']
HOOK = 'default_hooks.checkpoint.'
EMA = ['custom_hooks.0.type=EMAHook', 'custom_hooks.0.momentum=0.1', 'custom_hooks.0.priority=ABOVE_NORMAL']
KEEPS_ONE = [f'{HOOK}interval=2', f'{HOOK}max_keep_ckpts=1']
SETTINGS = {
    'as it comes': [f'{HOOK}interval=2'],
    'keeps one, and the best': [*KEEPS_ONE, f'{HOOK}save_best=mIoU'],
    'averages': [*KEEPS_ONE, *EMA],
    'used work dir': KEEPS_ONE,
    'out_dir': KEEPS_ONE,
    'other names': [*KEEPS_ONE, f'{HOOK}filename_tmpl=mine-{{}}.pth'],
}


def start(work_dir: Path, data: Path, options: list[str], *flags: str) -> subprocess.Popen:
    loaders = [f'{loader}_dataloader.dataset.data_root={data}' for loader in ('train', 'val', 'test')]
    small = ['train_dataloader.batch_size=2', 'val_dataloader.batch_size=2']
    command = [sys.executable, 'tools/train.py', CONFIG, '--work-dir', str(work_dir), *flags]
    with open(work_dir.with_suffix('.log'), 'w') as log:
        command += ['--cfg-options', *loaders, *small, *SHORT, *options]
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def finish(*args) -> None:
    if start(*args).wait():
        raise failure(args[0])


def failure(work_dir: Path) -> RuntimeError:
    return RuntimeError(
        f'{work_dir.name} failed though nobody killed it:\n{work_dir.with_suffix(".log").read_text()[-2000:]}'
    )


def last(work_dir: Path) -> Path:
    return Path((work_dir / 'last_checkpoint').read_text())


def soak(name: str, folder: Path, data: Path, kills: int) -> dict:
    """Kills a setting's training ``kills`` times at least, from its start again where it ends before."""
    rng, place = random.Random(name), folder / name.replace(' ', '-')
    options = [*SETTINGS[name], *([f'{HOOK}out_dir={place}-out'] if name == 'out_dir' else [])]
    started = time.monotonic()
    finish(whole := place.with_name(f'{place.name}-whole'), data, options)
    seconds, expected = time.monotonic() - started, read_checkpoint(last(whole))
    moments, runs = [], 0
    while len(moments) < kills:
        own = place.with_name(f'{place.name}-{runs}')
        if name == 'used work dir':
            finish(own, data, [*options, 'train_cfg.max_iters=20', 'randomness.seed=1'])
        moments += interrupt(own, data, options, rng, seconds)
        check_equal(read_checkpoint(last(own)), expected, name)
        runs += 1
    return {'kills': len(moments), 'trainings': runs, 'seconds_to_kill': moments, 'seconds_uninterrupted': seconds}


def interrupt(work_dir: Path, data: Path, options: list[str], rng: random.Random, seconds: float) -> list[float]:
    """Kills and resumes a training until it ends; when it was killed, in seconds from each start."""
    moments, flags = [], ()
    while True:
        process, moment = start(work_dir, data, options, *flags), rng.uniform(0.3, 1) * seconds
        try:
            if process.wait(moment):
                raise failure(work_dir)
            return moments
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        moments.append(round(moment, 2))
        # Killed before it began, a new run in a used work dir has left no trace of itself.
        if 'Checkpoints will be saved' in work_dir.with_suffix('.log').read_text():
            flags = ('--resume',)


def check_equal(found: dict, expected: dict, name: str) -> None:
    for part in ('state_dict', 'ema_state_dict'):
        pairs = [(key, value, found[part][key]) for key, value in expected.get(part, {}).items()]
        differing = [key for key, one, other in pairs if not torch.equal(torch.as_tensor(one), torch.as_tensor(other))]
        if differing:
            raise AssertionError(f'{name}: {len(differing)} tensors of {part} differ, such as {differing[:3]}')


def fill_disk(folder: Path, data: Path) -> dict:
    """Saves to a disk with room for one checkpoint and a half: an error, and the first is whole."""
    finish(sized := folder / 'sized', data, [f'{HOOK}interval=2', 'train_cfg.max_iters=4'])
    disk = folder / 'disk'
    disk.mkdir()
    size = int(1.5 * last(sized).stat().st_size)
    if subprocess.call(['mount', '-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', disk]):
        return {'skipped': 'no right to mount a tmpfs'}
    try:
        failed = start(folder / 'full', data, [f'{HOOK}interval=2', f'{HOOK}out_dir={disk}']).wait()
        message = (folder / 'full.log').read_text().strip().splitlines()[-1]
        left = sorted(path.name for path in (disk / 'full').iterdir())
        assert failed and left == ['iter_2.pth'] and read_checkpoint(disk / 'full/iter_2.pth')
        return {'error': message, 'left': left}
    finally:
        subprocess.call(['umount', disk])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', required=True, help='JSON file of the results')
    parser.add_argument('--kills', type=int, default=9, help='of each setting, at least')
    parser.add_argument('--jobs', type=int, default=2, help='trainings at a time')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        data = Path(folder, 'shapes')
        write_shapes(data, image_size=64, splits={'train': 8, 'val': 4})
        run = partial(soak, folder=Path(folder), data=data, kills=args.kills)
        results = {}
        ends = zip(SETTINGS, pool.map(run, SETTINGS))
        for name, result in itertools.chain(ends, [('full disk', None)]):
            results[name] = result or fill_disk(Path(folder), data)
            print(f'{name}: {results[name]}', flush=True)
            Path(args.out).write_text(json.dumps({'settings': results, **provenance()}, indent=1) + '\n')


if __name__ == '__main__':
    main()
