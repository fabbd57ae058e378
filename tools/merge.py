#!/usr/bin/env python
"""Folds a trained LoRA (or another tuner of peft that can be merged) into the backbone's weights.

The result is a checkpoint of the stock config, with nothing left of the method: it costs nothing at inference.
"""

import argparse
from pathlib import Path

import torch
from mmengine.config import DictAction
from mmengine.registry import MODELS, init_default_scope

import e3va_mm  # noqa: F401  (first: it makes configs that derive from `mmseg::` loadable)
from e3va_mm.backbones.tuned import TunedBackbone
from e3va_mm.checkpoints.base_weights import named_file
from e3va_mm.checkpoints.comparison import check_fits
from e3va_mm.checkpoints.files import read_checkpoint
from e3va_mm.checks import check_target
from e3va_mm.launch import read_config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config that was trained, with a TunedBackbone')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('target', help='.pth file to write')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides of the config, key=value')
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    check_target('target', args.target, [args.config, args.checkpoint])
    config = read_config(args.config, args.cfg_options)
    init_default_scope(config.default_scope)
    # In half precision, the weights would round most of the update away.
    config.model.backbone.pop('frozen_dtype', None)
    model = MODELS.build(config.model)
    if not isinstance(model.backbone, TunedBackbone):
        raise ValueError(f'{args.config} has a {type(model.backbone).__name__}; only a TunedBackbone can be merged')
    check_target('target', args.target, filter(None, [named_file(model.backbone.backbone)]))
    checkpoint = read_checkpoint(args.checkpoint)
    check_fits(model, checkpoint)
    model.load_state_dict(checkpoint['state_dict'], strict=False)  # the base is not in the file
    model.backbone = model.backbone.merge()
    torch.save({'state_dict': model.state_dict(), 'meta': checkpoint.get('meta', {})}, args.target)
    print(f'{args.target}: {Path(args.target).stat().st_size / 2**20:.2f} MiB')


if __name__ == '__main__':
    main()
