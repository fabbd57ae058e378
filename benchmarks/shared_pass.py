#!/usr/bin/env python
"""Time and memory of many tasks by one frozen pass, against as many models with a pass each, in one JSON file.

Tasks are UPerNet and RetinaNet in turn, beside one Swin, with random weights; images are noise, one at a time. Times
are of rounds in one process: in each, in random order, the first task alone, all by one pass, and all by a pass each;
what counts are the ratios in a round. On a CPU they are of one thread. Memory is what PyTorch has allocated at most on
a GPU, and that of the weights on a CPU.
Settings that are already in the file are not repeated.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, DefaultScope
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.bench import set_backbone
from benchmarks.cost import SIZES, TASKS, _image_size
from benchmarks.measure import quartiles, seconds_in_turn
from benchmarks.methods import backbone_of
from benchmarks.pages import format_shared
from benchmarks.training import ROOT, provenance
from e3va_mm.backbones.shared_pass import SharedPass
from e3va_mm.hooks.report import MIB

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
HEADS = ('upernet', 'retinanet')
PARTS = ('backbones', 'models')
KEYS = ('size', 'image_size', 'method', 'part', 'tasks')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add('--out', required=True, help='JSON file that collects the results')
    add('--sizes', nargs='+', default=['t'], choices=SIZES, help='of the Swin backbone')
    add('--image-sizes', nargs='+', type=_image_size, default=[(512, 512)], help='HxW')
    add('--methods', nargs='+', default=['e3va'], help='E³VA with options, as in benchmarks/cost.py: e3va+bf16')
    add('--tasks', nargs='+', type=int, default=[1, 2, 4, 8], help='numbers of tasks')
    add('--rounds', type=int, default=20, help='measured rounds of a setting')
    add('--warmup', type=int, default=3, help='rounds before them')
    add('--time-limit', type=float, default=float('inf'), help='seconds; no setting is started after them')
    add('--commit', help='recorded in the results; default: asked of git')
    return parser.parse_args()


class Tasks:
    """So many models, or their backbones alone, on the CPU, whose frozen bases have the same weights.

    Args:
        part: 'backbones' or 'models'.
        number: of them.
        size, method: see :func:`parse_args`.
        image_size: (H, W) of the image that they are applied to.
    """

    def __init__(self, part: str, number: int, size: str, method: str, image_size: tuple[int, int]) -> None:
        torch.manual_seed(0)
        self.image = torch.randn(1, 3, *image_size, device=DEVICE)
        models = [_build(HEADS[index % len(HEADS)], size, method) for index in range(number)]
        self.wrappers = [model.backbone for model in models]
        weights = self.wrappers[0].backbone.state_dict()
        fingerprint = self.wrappers[0].base_fingerprint()
        for wrapper in self.wrappers:
            wrapper.backbone.load_state_dict(weights, strict=False)
            # It takes seconds, and would be taken anew for each.
            wrapper._base_record['fingerprint'] = fingerprint
        self.modules = self.wrappers if part == 'backbones' else models
        self.pass_of_all = SharedPass(DEVICE)

    def own_bases(self) -> None:
        """Moves all to the device as they are."""
        for module in self.modules:
            module.to(DEVICE)

    def one_base(self) -> None:
        """From there, with one base for all."""
        for module, wrapper in zip(self.modules, self.wrappers):
            module.cpu()
            wrapper.family.forget_prepared()
        for number, module in enumerate(self.modules):
            self.pass_of_all.join(str(number), module)

    def run(self, number: int | None = None) -> None:
        """All, or the first so many, one behind the other."""
        for module in self.modules[:number]:
            if module in self.wrappers:
                module(self.image)
            else:
                module.predict(self.image, _samples(module, self.image))

    def run_shared(self) -> None:
        with self.pass_of_all.one_image():
            self.run()


def _samples(model: nn.Module, image: torch.Tensor) -> list | None:
    if not type(model).__module__.startswith('mmdet'):
        return None
    from mmdet.structures import DetDataSample

    sizes = dict.fromkeys(('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape'), tuple(image.shape[2:]))
    return [DetDataSample(metainfo=dict(sizes, scale_factor=(1.0, 1.0)))]


def _build(task: str, size: str, method: str) -> nn.Module:
    (path,) = ROOT.glob(TASKS[task][0].format(short=size, long=SIZES[size]))
    config = Config.fromfile(path)
    set_backbone(config, backbone_of(method))
    # Drawn on the device, where that takes no time.
    with DefaultScope.overwrite_default_scope(config.default_scope), DEVICE:
        return MODELS.build(config.model).cpu().eval()


def now() -> float:
    """Seconds; on a CPU those that the processor has worked for this process, whatever else it does."""
    if DEVICE.type != 'cuda':
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@torch.no_grad()
def used_memory(modules: list[nn.Module], run: Callable[[], None]) -> dict[str, float]:
    """MiB of weights, each counted once; on a GPU also what was allocated at most while these modules ran."""
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    result = {'weights_mib': round(sum(storages.values()) / MIB, 1)}
    run()
    if DEVICE.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run()
        result['peak_mib'] = round(torch.cuda.max_memory_allocated() / MIB, 1)
    return result


def timed(run: Callable[[], None]) -> float:
    started = now()
    run()
    return now() - started


@torch.no_grad()
def timed_rounds(ways: dict[str, Callable[[], None]], rounds: int, warmup: int) -> dict:
    """Seconds of each way, with quartiles, and the ratios of the shared one to the others' in the same round."""
    calls = {name: partial(timed, run) for name, run in ways.items()}
    seconds_in_turn(calls, warmup)
    seconds = seconds_in_turn(calls, rounds)
    result = {key: value for name, own in seconds.items() for key, value in quartiles(f'{name}_seconds', own).items()}
    for name in ('one', 'separate'):
        ratios = [shared / other for shared, other in zip(seconds['shared'], seconds[name])]
        result.update(quartiles(f'shared_of_{name}', ratios))
    return result


def measure(part: str, number: int, rounds: int, warmup: int, *setting) -> dict:
    """Memory with a base each and with one, and times; ``setting`` as for :class:`Tasks`."""
    tasks = Tasks(part, number, *setting)
    tasks.own_bases()
    separate = used_memory(tasks.modules, tasks.run)
    tasks.one_base()
    shared = used_memory(tasks.modules, tasks.run_shared)
    # With equal weights it does not matter whose are read.
    ways = {'one': lambda: tasks.run(1), 'shared': tasks.run_shared, 'separate': tasks.run}
    return {'separate': separate, 'shared': shared, **timed_rounds(ways, rounds, warmup)}


def main() -> None:
    args, started = parse_args(), time.monotonic()
    if DEVICE.type != 'cuda':
        torch.set_num_threads(1)
    MMLogger.get_instance('benchmark', log_level='ERROR')
    out = Path(args.out)
    rows = json.loads(out.read_text())['rows'] if out.is_file() else []
    done = [[row[key] for key in KEYS] for row in rows]
    grid = itertools.product(args.sizes, args.image_sizes, args.methods, PARTS, args.tasks)
    for size, image_size, method, part, number in grid:
        if [size, list(image_size), method, part, number] in done:
            continue
        if time.monotonic() - started > args.time_limit:
            sys.exit('--time-limit is over; not all settings have been measured')
        result = measure(part, number, args.rounds, args.warmup, size, method, image_size)
        gc.collect()  # Accelerated modules are cycles.
        source = provenance(args.commit)
        origin = {key: source[key] for key in ('date', 'device', 'commit')}
        rows.append(dict(zip(KEYS, (size, image_size, method, part, number)), **result, **origin))
        print(rows[-1], flush=True)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({**source, 'rounds': args.rounds, 'rows': rows}, indent=1) + '\n')
    print(format_shared(out))


if __name__ == '__main__':
    main()
