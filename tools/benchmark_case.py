#!/usr/bin/env python
"""Measures one case of tools/benchmark.py in a process of its own: ``benchmark_case.py CASE.json RESULT.json``."""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner, set_random_seed

from e3va_mm.hooks.amp import run_in_float32
from e3va_mm.hooks.report import MIB, process_peak_bytes
from e3va_mm.launch import enable_amp

AMP_DTYPES = {'fp32': None, 'amp-fp16': 'float16', 'amp-bf16': 'bfloat16'}
GIB = 2**30


class Bench:
    """A model with its optimizer; steps once it has been moved to the device and given a batch.

    What a detection head has to do depends on what it predicts. So that all methods get the same of it, heads and
    batches are drawn from the same seeds, and the learning rate is 0: the optimizer does its work, the weights stay.

    Args:
        case: ``config``, ``backbone`` (overrides; ``type`` wraps), ``precision``, ``image_size`` (H, W), ``data``
            ('synthetic' or 'real') and ``cfg_options``.
    """

    def __init__(self, case: dict) -> None:
        self.case = case
        config = Config.fromfile(case['config'])
        init_default_scope(config.default_scope)
        config.merge_from_dict(case['cfg_options'])
        set_backbone(config, case['backbone'])
        if AMP_DTYPES[case['precision']]:
            enable_amp(config)
            config.optim_wrapper.dtype = AMP_DTYPES[case['precision']]
        config.optim_wrapper.optimizer.lr = 0
        self.config = config
        self.device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
        # Drawn on the device, where that takes no time; moved there from the host afterwards, as in a training.
        with self.device:
            self.model = self._build(config.model)
        self.model.cpu()

    @staticmethod
    def _build(config) -> torch.nn.Module:
        torch.manual_seed(0)
        backbone = MODELS.build(config.backbone)
        torch.manual_seed(1)
        # Built by itself, because methods draw different numbers of weights.
        config.backbone = dict(type=lambda: backbone)
        return MODELS.build(config)

    def to_device(self) -> None:
        if self.device.type == 'cuda':
            torch.cuda.empty_cache()
        self.model.to(self.device).train()
        if self.case['precision'] == 'amp-bf16':
            run_in_float32(self.model)
        self.optim = build_optim_wrapper(self.model, self.config.optim_wrapper)

    def load_batch(self, batch_size: int) -> None:
        # Of random and numpy too, which draw the crops and sizes of real data.
        set_random_seed(2)
        make = real_batch if self.case['data'] == 'real' else synthetic_batch
        batch = make(self.config, batch_size, self.case['image_size'])
        self.batch = self.model.data_preprocessor(batch, training=True)

    def step(self) -> None:
        """What mmengine's ``train_step`` does with a batch that is already on the device."""
        with self.optim.optim_context(self.model):
            losses = self.model(**self.batch, mode='loss')
        loss, _ = self.model.parse_losses(losses)
        self.optim.update_params(loss)

    def timed_step(self) -> float:
        """Seconds of a step."""
        started = self.synchronize()
        self.step()
        return self.synchronize() - started

    def synchronize(self) -> float:
        if self.device.type == 'cuda':
            torch.cuda.synchronize()
        return time.perf_counter()


def set_backbone(config: Config, backbone: dict) -> None:
    """Changes the stock backbone by ``backbone``, or wraps it if that names a ``type``.

    No weights are loaded or drawn but those of the constructors: what they are does not change what a step costs.
    """
    stock = config.model.backbone
    stock.init_cfg = None
    for name in ('pretrained', 'checkpoint'):
        stock.pop(name, None)
    if 'type' in backbone:
        config.model.backbone = dict(backbone, backbone=stock)
    else:
        stock.update(backbone)


def real_batch(config: Config, batch_size: int, _) -> dict:
    """The first training batch of the config's own data, whatever its image size."""
    config.train_dataloader.update(batch_size=batch_size, num_workers=0, persistent_workers=False)
    return next(iter(Runner.build_dataloader(config.train_dataloader, seed=0)))


def synthetic_batch(config: Config, batch_size: int, image_size: tuple[int, int]) -> dict:
    """Random images of one size, with random labels in blocks or 10 random boxes and masks an image."""
    height, width = image_size
    if config.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        head = config.model.get('bbox_head') or config.model.roi_head.bbox_head
        num_classes = (head[0] if isinstance(head, (list, tuple)) else head).num_classes
        with_mask = 'mask_head' in config.model.get('roi_head', {})
        # It draws labels from 1 up, which leaves none for a single class.
        batch = demo_mm_inputs(batch_size, (3, height, width), [10] * batch_size, num_classes + 1, with_mask=with_mask)
        for sample in batch['data_samples']:
            sample.gt_instances.labels -= 1
        return batch
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    inputs, samples = [], []
    for _ in range(batch_size):
        inputs.append(torch.randint(256, (3, height, width), dtype=torch.uint8))
        blocks = torch.randint(config.model.decode_head.num_classes, (1, -(-height // 32), -(-width // 32)))
        labels = blocks.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, :height, :width]
        samples.append(SegDataSample(gt_sem_seg=PixelData(data=labels), metainfo=dict(img_shape=(height, width))))
    return dict(inputs=inputs, data_samples=samples)


def quartiles(name: str, values: list[float]) -> dict:
    """The median as ``name``, and the quartiles around it."""
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else 3 * values
    return {name: median, f'{name}_quartiles': [low, high]}


def measure(bench: Bench, warmup: int, steps: int, profile: bool) -> dict:
    """Peak memory and the time of a step, then where both go."""
    for _ in range(warmup):
        bench.step()
    cuda = bench.device.type == 'cuda'
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = [bench.timed_step() for _ in range(steps)]
    result = {'peak_memory_mib': round(process_peak_bytes() / MIB, 1), **quartiles('step_seconds', seconds)}
    if cuda:
        result['peak_reserved_mib'] = round(torch.cuda.max_memory_reserved() / MIB, 1)
    if profile:
        result['most_time'] = most_time(bench)
    return {
        **result,
        'saved_in_backbone_mib': round(saved_bytes(bench) / MIB, 1),
        'phases': measure_phases(bench, steps),
    }


def most_time(bench: Bench, number: int = 20) -> list[dict]:
    """The kernels (on a CPU, the operators) that take the most time of one step, and what all of them take."""
    cuda = bench.device.type == 'cuda'
    activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        bench.step()
        bench.synchronize()
    seconds = {
        event.key: ((event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6, event.count)
        for event in profiler.key_averages()
    }
    # Calls into the CUDA runtime are listed too, without any time on the device.
    seconds = {name: figures for name, figures in seconds.items() if figures[0]}
    rows = sorted(seconds.items(), key=lambda item: -item[1][0])[:number]
    total = (sum(time for time, _ in seconds.values()), sum(count for _, count in seconds.values()))
    return [{'name': name[:120], 'seconds': t, 'calls': c} for name, (t, c) in [('all', total), *rows]]


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


def measure_phases(bench: Bench, steps: int) -> dict[str, dict[str, float]]:
    """Median seconds of each phase and, on CUDA, the peak of allocated memory within it."""
    rows = [_phases_of_a_step(bench) for _ in range(min(steps, 3))]
    return {
        phase: {key: statistics.median(row[phase][key] for row in rows) for key in rows[0][phase]} for phase in rows[0]
    }


def _phases_of_a_step(bench: Bench) -> dict[str, dict[str, float]]:
    marks = [('start', bench.synchronize(), 0.0)]

    def mark(phase: str) -> None:
        cuda = bench.device.type == 'cuda'
        marks.append((phase, bench.synchronize(), torch.cuda.max_memory_allocated() / MIB if cuda else 0.0))
        if cuda:
            torch.cuda.reset_peak_memory_stats()

    backbone = bench.model.backbone
    with bench.optim.optim_context(bench.model):
        frozen_seconds = run_frozen(bench)
        mark('alone')
        handle = backbone.register_forward_hook(lambda *_: mark('backbone'))
        losses = bench.model(**bench.batch, mode='loss')
        handle.remove()
        mark('neck_and_head')
    loss, _ = bench.model.parse_losses(losses)
    bench.optim.backward(loss)
    mark('backward')
    bench.optim.step()
    bench.optim.zero_grad()
    mark('optimizer')
    phases = {
        name: {'seconds': now - before, 'peak_mib': peak}
        for (_, before, _), (name, now, peak) in itertools.pairwise(marks)
    }
    alone, forward = phases.pop('alone'), phases.pop('backbone')
    forward_seconds = forward['seconds']
    if frozen_seconds is None:
        return {'backbone_forward': forward, **phases}
    split = {'seconds': frozen_seconds, 'peak_mib': alone['peak_mib']}
    return {'frozen_forward': split, 'highway': {**forward, 'seconds': forward_seconds - frozen_seconds}, **phases}


def run_frozen(bench: Bench) -> float | None:
    """Seconds of the frozen part of E3VA's forward pass by itself; ``None`` for backbones without a highway."""
    backbone, images = bench.model.backbone, bench.batch['inputs']
    if not hasattr(backbone, 'highway'):
        return None
    started = bench.synchronize()
    with torch.no_grad(), backbone.frozen_forward(images):
        tokens, size = backbone.taps.embed(images)
        for index in range(backbone.taps.num_stages):
            tokens = backbone.taps.run_stage(index, tokens, size, lambda tap: None)
            if index + 1 < backbone.taps.num_stages:
                tokens, size, _ = backbone.taps.follow(index, tokens, size)
    return bench.synchronize() - started


def limit_memory(gibibytes: float) -> None:
    if not torch.cuda.is_available():
        raise ValueError('--memory-cap needs a CUDA device')
    torch.cuda.set_per_process_memory_fraction(gibibytes * GIB / torch.cuda.get_device_properties(0).total_memory)


def largest_batch(bench: Bench) -> int:
    """The largest batch that trains under the memory cap; 0 if not even one image does."""
    fits, fails = 0, None
    while fails is None or fails - fits > 1:
        batch = max(1, 2 * fits) if fails is None else (fits + fails) // 2
        if trains(bench, batch):
            fits = batch
        else:
            fails = batch
    return fits


def trains(bench: Bench, batch_size: int) -> bool:
    try:
        bench.load_batch(batch_size)
        for _ in range(3):
            bench.step()
        return True
    except torch.OutOfMemoryError:
        return False
    finally:
        bench.batch = None
        bench.optim.zero_grad()
        torch.cuda.empty_cache()


def run_case(case: dict) -> dict:
    bench = Bench(case)
    if case['memory_cap']:
        limit_memory(case['memory_cap'])
    batch_size = case['batch_size']
    try:
        bench.to_device()
        if batch_size == 'largest':
            batch_size = largest_batch(bench)
        if not batch_size:
            return {'batch_size': 0, 'out_of_memory': True}
        bench.load_batch(batch_size)
        result = measure(bench, case['warmup'], case['steps'], case['profile'])
    except torch.OutOfMemoryError:
        return {'batch_size': batch_size, 'out_of_memory': True}
    return {'batch_size': batch_size, **result, 'images_per_second': batch_size / result['step_seconds']}


def load_libraries(case: dict) -> None:
    importlib.import_module(f'{Config.fromfile(case["config"]).default_scope}.models')


@contextlib.contextmanager
def exclusive(path: str):
    """Keeps other cases off the device and the processor: until it is their turn, they only load libraries."""
    with open(path, 'w') as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


if __name__ == '__main__':
    MMLogger.get_instance('benchmark', log_level='ERROR')
    given, target = map(Path, sys.argv[1:])
    case = json.loads(given.read_text())
    load_libraries(case)
    with exclusive(case['lock']):
        target.write_text(json.dumps(run_case(case)))
