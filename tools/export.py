#!/usr/bin/env python
"""Writes a trained model as ONNX, and compares what onnxruntime makes of it with what torch does.

The input is an image as it is read: (1, 3, H, W) float32 in 0..255 and the order of channels that the config's pipeline
loads (BGR); normalisation is in the graph. Segmentors put out logits at the input's size, detectors of one stage what
their head does, before boxes are decoded.
"""

import argparse
import importlib.util
import inspect
import json
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import init_default_scope
from torch import Tensor, nn

import e3va_mm  # noqa: F401  (first: it makes configs that derive from `mmseg::` loadable)
from e3va_mm.backbones.base import FrozenBackbone
from e3va_mm.checks import check_count, check_target
from e3va_mm.launch import add_config_arguments, load_model, parse_checkpoint, read_config

# Of the largest value of an output.
TOLERANCE = 1e-4
# Open heights and widths are multiples of it: the largest stride of common backbones.
MULTIPLE, SMALLEST_EXAMPLE = 32, 512


class Deployed(nn.Module):
    """From an image as it is read to what the model puts out without Python behind it.

    Raises:
        ValueError: the model puts out nothing that a graph could.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.is_segmentor = model, hasattr(model, 'encode_decode')
        if not self.is_segmentor:
            from mmdet.models.detectors import SingleStageDetector

            if not isinstance(model, SingleStageDetector):
                raise ValueError(
                    f'{type(model).__name__} can not be exported, only segmentors and detectors of one dense head: '
                    'others choose regions or match queries in Python between their parts'
                )

    def forward(self, image: Tensor) -> Tensor | tuple:
        """image (1, 3, H, W) in 0..255 -> logits (1, classes, H, W), or lists of (1, channels, h, w) a level."""
        preprocessor, size = self.model.data_preprocessor, image.shape[2:]
        if preprocessor._channel_conversion:
            image = image.flip(1)
        if preprocessor._enable_normalize:
            image = (image - preprocessor.mean) / preprocessor.std
        if self.is_segmentor:
            return self.model.encode_decode(image, [dict(img_shape=size, pad_shape=size, ori_shape=size)])
        return self.model._forward(image)

    def output_names(self, outputs: Tensor | tuple) -> list[str]:
        if self.is_segmentor:
            return ['logits']
        kinds = list(inspect.signature(self.model.bbox_head.predict_by_feat).parameters)
        return [f'{kind}_{level}' for kind, levels in zip(kinds, outputs) for level in range(len(levels))]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('--size', nargs=2, type=int, default=(512, 512), metavar=('H', 'W'), help='of the images')
    parser.add_argument(
        '--dynamic', action='store_true', help=f'leave height and width open, in multiples of {MULTIPLE}'
    )
    return parse_checkpoint(parser, '.onnx file to write')


def check_packages() -> None:
    missing = [name for name in ('onnx', 'onnxscript') if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"export needs {' and '.join(missing)}: pip install 'e3va_mm[onnx]'")


def build(config: Config, checkpoint: str) -> Deployed:
    """The model on the CPU, in the precision of its weights."""
    backbone = config.model.get('backbone', {})
    if 'frozen_dtype' in backbone or backbone.get('type') == 'E3VABackbone':
        backbone.frozen_dtype = None
    init_default_scope(config.default_scope)
    model, _ = load_model(config, checkpoint, 'cpu')
    if hasattr(model, 'test_cfg') and (model.test_cfg or {}).get('mode') == 'slide':
        print('the config tests by sliding windows: the graph is that of a window, or of a whole image')
    return Deployed(model).eval()


def to_onnx(deployed: Deployed, image: Tensor, names: list[str], dynamic: bool):
    """The graph, with what a user of it has to know as its metadata.

    Raises:
        ValueError: torch can not export the model, or not with open sizes.
    """
    backbone = deployed.model.backbone
    if dynamic and isinstance(backbone, FrozenBackbone) and not backbone.family.open_sizes:
        name = type(backbone.family).__name__
        raise ValueError(f'--dynamic does not go with {name}, which prepares its windows for one size: give its --size')
    sizes = {2: MULTIPLE * torch.export.Dim('h'), 3: MULTIPLE * torch.export.Dim('w')}
    options = dict(dynamic_shapes=(sizes,)) if dynamic else {}
    try:
        program = torch.onnx.export(
            deployed, (image,), dynamo=True, input_names=['image'], output_names=names, verbose=False, **options
        )
    except Exception as error:
        model, advice = deployed.model, ': leave --dynamic out, and give its --size' if dynamic else ''
        parts = f'{type(model).__name__} with {type(_stock(model)).__name__}'
        raise ValueError(f'torch can not export {parts}{" at open sizes" * dynamic}{advice} ({error})') from error
    meta = {'image': '(1, 3, H, W) float32, 0..255, in the order of channels that the config loads (mmcv: BGR)'}
    meta['classes'] = json.dumps((getattr(deployed.model, 'dataset_meta', None) or {}).get('classes'))
    program.model.metadata_props.update(meta)
    return program


def _stock(model: nn.Module) -> nn.Module:
    return model.backbone.backbone if isinstance(model.backbone, FrozenBackbone) else model.backbone


def largest_difference(path: str, deployed: Deployed, sizes: list[tuple[int, int]]) -> float:
    """Between onnxruntime and torch, over images of noise; relative to the largest value of an output.

    Raises:
        ValueError: onnxruntime does not run the graph at one of the sizes.
    """
    import onnxruntime

    session, differences = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider']), []
    for size in sizes:
        image = 255 * torch.rand(1, 3, *size)
        expected = torch.utils._pytree.tree_leaves(deployed(image))
        try:
            outputs = session.run(None, {'image': image.numpy()})
        except Exception as error:
            raise ValueError(f'onnxruntime can not run {path} at {size}: leave --dynamic out ({error})') from error
        for found, output in zip(outputs, expected):
            differences.append((torch.from_numpy(found) - output).abs().max() / output.abs().max().clamp(min=1e-12))
    return max(map(float, differences))


@torch.no_grad()
def main() -> None:
    args = parse_args()
    check_packages()
    for length in args.size:
        check_count('--size', length)
    if args.dynamic and any(length % MULTIPLE for length in args.size):
        raise ValueError(f'--dynamic needs a --size in multiples of {MULTIPLE}, got {tuple(args.size)}')
    if Path(args.target).suffix != '.onnx':
        raise ValueError(f'{args.target} must end in .onnx')
    check_target('target', args.target, [args.config, args.checkpoint])
    deployed = build(read_config(args.config, args.cfg_options, args.tune), args.checkpoint)
    image = 255 * torch.rand(1, 3, *args.size)
    outputs = deployed(image)  # The first pass of a highway compares what it hears, which a trace can not.
    names = deployed.output_names(outputs)
    if args.dynamic:  # On a small example, what is one window or pixel there would be taken for one everywhere.
        image = 255 * torch.rand(1, 3, *(max(length, SMALLEST_EXAMPLE) for length in args.size))
    to_onnx(deployed, image, names, args.dynamic).save(args.target)
    print(f'{args.target}: {Path(args.target).stat().st_size / 2**20:.2f} MiB, image -> {", ".join(names)}')
    if importlib.util.find_spec('onnxruntime') is None:
        print("not compared with torch: pip install 'e3va_mm[onnx]' for onnxruntime")
        return
    others = [tuple(length + MULTIPLE for length in args.size)] if args.dynamic else []
    difference = largest_difference(args.target, deployed, [tuple(args.size), *others])
    if difference > TOLERANCE:
        raise ValueError(
            f'onnxruntime differs from torch by {difference:.1e} of the largest value: do not use {args.target}'
        )
    print(f'onnxruntime differs from torch by {difference:.1e} of the largest value')


if __name__ == '__main__':
    main()
