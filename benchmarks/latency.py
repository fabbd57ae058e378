#!/usr/bin/env python
"""How long one image takes: a stock UPerNet with Swin-T beside the same under E³VA, with mixers, and with merged LoRA.

All variants take turns in one process; what counts are medians of the ratios to stock in the same round.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import seconds_in_turn
from benchmarks.training import provenance
from e3va_mm.launch import read_config
from e3va_mm.tune import tune

CONFIG = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
# What wraps the backbone, by the names in the table.
VARIANTS = {
    'stock': (None, {}),
    'LoRA, merged': ('lora', {}),
    'E³VA': ('e3va', {'model.backbone.frozen_dtype': None}),
    'E³VA + mixers': ('e3va', {'model.backbone.frozen_dtype': None, 'model.backbone.mixer': {}}),
}

ENGINES = ('torch', 'torch-amp', 'onnxruntime')


class Backbone(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.backbone = model.backbone

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.backbone(image))


class Whole(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        size = image.shape[2:]
        return self.model.encode_decode(image, [dict(img_shape=size, pad_shape=size, ori_shape=size)])


PARTS = {'backbone': Backbone, 'whole': Whole}


def build(variant: str, device: str) -> nn.Module:
    """The model with random weights, and with trained parts off their silent start."""
    method, changes = VARIANTS[variant]
    config = read_config(CONFIG, {'model.backbone.init_cfg': None, 'model.pretrained': None})
    if method:
        config = tune(config, method)
        config.merge_from_dict(changes)
    init_default_scope(config.default_scope)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(MODELS.build(config.model))
    model.init_weights()
    with torch.no_grad():
        for parameter in model.backbone.parameters():
            if method and parameter.requires_grad:
                parameter.add_(0.01 * torch.randn_like(parameter))
    if method == 'lora':
        model.backbone = model.backbone.merge()
    return model.eval().to(device)


def in_onnxruntime(model: nn.Module, image: Tensor, folder: str) -> Callable[[], object]:
    """A call of the exported model, on as many threads as torch has."""
    import onnxruntime

    path = Path(folder, f'{id(model)}.onnx')
    torch.onnx.export(model, (image,), dynamo=True, input_names=['image'], verbose=False).save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry('session.set_denormal_as_zero', '1')
    provider = 'CUDAExecutionProvider' if image.is_cuda else 'CPUExecutionProvider'
    session = onnxruntime.InferenceSession(path, options, providers=[provider])
    inputs = {'image': image.cpu().numpy()}
    return lambda: session.run(None, inputs)


def in_torch(model: nn.Module, image: Tensor, amp: bool) -> None:
    with torch.autocast(image.device.type, torch.float16, enabled=amp):
        model(image)


def timed(call: Callable[[], object]) -> float:
    """Seconds; of the clock, since onnxruntime has threads of its own."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(part: str, image: Tensor, rounds: int, engines: list[str]) -> list[dict]:
    """A row for each variant and engine: its milliseconds, their median, and that of the rounds' ratios to stock."""
    calls = {}
    with tempfile.TemporaryDirectory() as folder:
        for variant in VARIANTS:
            model = PARTS[part](build(variant, str(image.device))).eval()
            model(image)  # The first pass of a highway is checked.
            for engine in (each for each in engines if each != 'onnxruntime'):
                calls[variant, engine] = partial(in_torch, model, image, engine == 'torch-amp')
            if 'onnxruntime' in engines:
                calls[variant, 'onnxruntime'] = in_onnxruntime(model, image, folder)
        calls = {key: partial(timed, call) for key, call in calls.items()}
        seconds_in_turn(calls, 1)  # warms up
        times = seconds_in_turn(calls, rounds)
    return [
        {
            'part': part,
            'variant': variant,
            'engine': engine,
            'median_ms': round(1e3 * statistics.median(values), 2),
            'ratio': round(statistics.median(map(operator.truediv, values, times['stock', engine])), 3),
            'ms': [round(1e3 * value, 2) for value in values],
        }
        for (variant, engine), values in times.items()
    ]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--out', required=True, help='.json file to write')
    parser.add_argument('--rounds', type=int, default=15)
    parser.add_argument('--size', type=int, default=512)
    parser.add_argument('--parts', nargs='+', choices=PARTS, default=list(PARTS))
    parser.add_argument('--engines', nargs='+', choices=ENGINES, default=['torch', 'onnxruntime'])
    parser.add_argument('--commit', help='recorded in the results; default: asked of git')
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    args = parse_args()
    if Path(args.out).is_file():
        print(f'{args.out} is there; delete it to measure again')
        return
    # Shift masks make softmax put out denormal numbers, with which CPUs are slow, by as much as the weights have it.
    torch.set_flush_denormal(True)
    image = torch.randn(1, 3, args.size, args.size, device='cuda' if torch.cuda.is_available() else 'cpu')
    rows = [row for part in args.parts for row in measure(part, image, args.rounds, args.engines)]
    settings = {'config': CONFIG, 'size': args.size, 'batch': 1, 'threads': torch.get_num_threads()}
    found = {'load': round(os.getloadavg()[0], 1), **settings, **provenance(args.commit), 'rows': rows}
    Path(args.out).write_text(json.dumps(found, indent=1, ensure_ascii=False))
    for row in rows:
        print(
            f'{row["part"]:9} {row["engine"]:12} {row["variant"]:14} {row["median_ms"]:9.1f} ms  x {row["ratio"]:.3f}'
        )


if __name__ == '__main__':
    main()
