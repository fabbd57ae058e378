"""Measures cases of benchmarks/cost.py in a process of its own: ``measure.py JOB.json RUNS.json``."""

from __future__ import annotations

import fcntl
import importlib
import json
import os
import random
import statistics
import sys
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from torch import nn

if __name__ == '__main__':
    # This folder, where libraries would find coverage.py under the name of the package.
    del sys.path[0]

from benchmarks.bench import Bench
from e3va_mm.hooks.report import MIB, process_peak_bytes

GIB = 2**30
# What a desktop and CUDA itself take of a card, which is no memory of PyTorch's.
TAKEN_GIB = 0.5


def measure_cost(cases: list[dict]) -> list[dict]:
    """Of one model with several batches, each case's :func:`cost`."""
    bench = Bench(cases[0])
    if not fits_device(bench):
        return [{'batch_size': case['batch_size'], 'out_of_memory': True} for case in cases]
    return [cost(bench, case) for case in cases]


def cost(bench: Bench, case: dict) -> dict:
    """Peak memory, the time of a step, and what the backbone keeps for the backward pass.

    Of several processes, what the backbone keeps is not measured, but the time of a step without the others.
    """
    try:
        bench.load_batch(case['batch_size'], case['image_size'])
        bench.warm_up(case['warmup'])
        if bench.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
        seconds = [bench.timed_step() for _ in range(case['steps'])]
        memory, times = {'peak_memory_mib': process_peak_bytes()}, quartiles('step_seconds', seconds)
        if bench.replica is bench.model:
            memory['saved_in_backbone_mib'] = saved_bytes(bench)
        elif 'sharded' not in bench.options:
            times.update(apart(bench, case))
    except torch.OutOfMemoryError:
        return {'batch_size': case['batch_size'], 'out_of_memory': True}
    finally:
        clear(bench)
    memory = {key: round(count / MIB, 1) for key, count in memory.items()}
    return {'batch_size': case['batch_size'], **memory, **times}


def clear(bench: Bench) -> None:
    """Lets go of batch and gradients, whether a step has come to its end or not."""
    bench.batch = None
    bench.optim.zero_grad()
    if bench.device.type == 'cuda':
        torch.cuda.empty_cache()


def apart(bench: Bench, case: dict) -> dict:
    """Quartiles of steps that exchange nothing: of all processes at once, and of the first while the others wait.

    Processes differ in speed, so what several cost is told by the same ones.
    """
    own, _ = torch.distributed.new_subgroups(group_size=1)
    norms = {module: module.process_group for module in bench.model.modules() if isinstance(module, nn.SyncBatchNorm)}
    for norm in norms:
        norm.process_group = own
    replica, bench.replica, times = bench.replica, bench.model, {}
    for name, takes_part in (('apart_seconds', True), ('alone_seconds', is_main_process())):
        torch.distributed.barrier()
        if takes_part:
            bench.warm_up(case['warmup'])
            times.update(quartiles(name, [bench.timed_step() for _ in range(case['steps'])]))
    torch.distributed.barrier()
    bench.replica = replica
    for norm, group in norms.items():
        norm.process_group = group
    return times


def quartiles(name: str, values: list[float]) -> dict:
    """The median as ``name``, and the quartiles around it."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values
    return {name: median, f'{name}_quartiles': [low, high]}


def saved_bytes(bench: Bench) -> int:
    """Bytes that the backbone keeps between forward and backward pass, the weights not counted."""
    owned = {tensor.untyped_storage().data_ptr() for tensor in [*bench.model.parameters(), bench.batch['inputs']]}
    kept: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with bench.optim.optim_context(bench.model), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        features = bench.model.backbone(bench.batch['inputs'])
    del features
    return sum(kept.values())


def measure_in_turn(cases: list[dict]) -> list[dict]:
    """Median and quartiles of each case's steps (seconds), and of their ratio to the first case's in the same round."""
    benches = [Bench(case) for case in cases]
    for bench, case in zip(benches, cases):
        bench.to_device()
        bench.load_batch(case['batch_size'])
        bench.warm_up(case['warmup'])
    steps = {index: bench.timed_step for index, bench in enumerate(benches)}
    seconds = list(seconds_in_turn(steps, cases[0]['steps']).values())
    of_first = [[one / first for one, first in zip(own, seconds[0])] for own in seconds]
    return [
        {'batch_size': case['batch_size'], **quartiles('step_seconds', own), **quartiles('of_first', ratios)}
        for case, own, ratios in zip(cases, seconds, of_first)
    ]


def seconds_in_turn(timed: dict[Hashable, Callable[[], float]], rounds: int) -> dict[Hashable, list[float]]:
    """What calls say that they took, in rounds of all of them; so what else the machine does falls on all."""
    order, draw, seconds = list(timed), random.Random(0), {name: [] for name in timed}
    for _ in range(rounds):
        # Each behind any other: what one leaves in caches is not always the same one's gain.
        draw.shuffle(order)
        for name in order:
            seconds[name].append(timed[name]())
    return seconds


def measure_fits(cases: list[dict]) -> list[dict]:
    """Of one case: for each card (GB, as it is sold), the largest batch that trains in its memory; 0 if none does.

    Weights are loaded under the same cap, from the host. Of the smallest batch, :func:`cost` too.
    """
    (case,) = cases
    bench, peaks, largest, is_loaded = Bench(case), {}, {}, False
    # UPerNet's batch norm behind its pooling to 1×1 takes no single image.
    least = 2 if bench.config.default_scope == 'mmseg' else 1
    for gigabytes in sorted(case['cards']):
        limit = gigabytes * 1e9 - TAKEN_GIB * GIB
        limit_memory(limit)
        is_loaded = is_loaded or fits_device(bench)
        guess = extrapolate(peaks, limit) if len(peaks) > 1 else least
        tried = partial(trains, bench, peaks=peaks)
        largest[gigabytes] = largest_batch(tried, guess, least, case['most_images']) if is_loaded else 0
    found = {'largest': largest, 'most_images': case['most_images'], 'taken_gib': TAKEN_GIB}
    if any(largest.values()):
        found['cost'] = cost(bench, {**case, 'batch_size': least})
    return [found]


def limit_memory(limit: float) -> None:
    """Caps what PyTorch takes of the device, in bytes."""
    if not torch.cuda.is_available():
        raise ValueError('a memory cap needs a CUDA device')
    torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)


def fits_device(bench: Bench) -> bool:
    """Whether there is room for the weights; if not, they stay on the host."""
    try:
        bench.to_device()
    except torch.OutOfMemoryError:
        bench.model.cpu()
        torch.cuda.empty_cache()
        return False
    return True


def trains(bench: Bench, images: int, peaks: dict[int, int]) -> bool:
    """Whether two steps run, now or under a smaller cap; their peak memory (bytes) goes into ``peaks``."""
    if images in peaks:
        return True
    torch.cuda.reset_peak_memory_stats()
    try:
        bench.load_batch(images)
        bench.warm_up(2)
    except torch.OutOfMemoryError:
        return False
    finally:
        clear(bench)
    peaks[images] = torch.cuda.max_memory_allocated()
    return True


def extrapolate(peaks: dict[int, int], limit: float) -> int:
    """The batch that takes ``limit`` bytes, on the line through the two largest that were measured."""
    (few, low), (many, high) = sorted(peaks.items())[-2:]
    return many + int((limit - high) * (many - few) / max(1, high - low))


def largest_batch(fits: Callable[[int], bool], guess: int, least: int, most: int) -> int:
    """The largest of ``least`` to ``most`` that fits, sought from ``guess`` step by step; 0 if none does."""
    batch = min(max(guess, least), most)
    if fits(batch):
        while batch < most and fits(batch + 1):
            batch += 1
        return batch
    return next((smaller for smaller in range(batch - 1, least - 1, -1) if fits(smaller)), 0)


def measure_gradients(cases: list[dict]) -> list[dict]:
    """Of one case: MiB of gradients that each of several processes exchanges in a step, and how many the backbone's."""
    from e3va_mm.hooks.report import gradient_bytes  # which earlier checkouts have not

    (case,) = cases
    model = Bench(case).model
    return [{'gradients_mib': gradient_bytes(model) / MIB, 'backbone_mib': gradient_bytes(model.backbone) / MIB}]


MEASURES = {'cost': measure_cost, 'in-turn': measure_in_turn, 'fits': measure_fits, 'gradients': measure_gradients}


def main() -> None:
    MMLogger.get_instance('benchmark', log_level='ERROR')
    given, target = map(Path, sys.argv[1:])
    job = json.loads(given.read_text())
    importlib.import_module(f'{Config.fromfile(job["cases"][0]["config"]).default_scope}.models')
    with open(job['lock'], 'w') as lock:
        # Until it is its turn, a process only loads libraries, and leaves device and processor to others.
        if int(os.environ.get('RANK', 0)) == 0:
            fcntl.flock(lock, fcntl.LOCK_EX)
        join_others()
        results = MEASURES[job['measure']](job['cases'])
        if is_main_process():
            target.write_text(json.dumps(results))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def join_others() -> None:
    """The processes that torchrun has started beside this one, if there are any."""
    if not torch.distributed.is_torchelastic_launched():
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ['LOCAL_RANK']))
    torch.distributed.init_process_group()


if __name__ == '__main__':
    main()
