#!/usr/bin/env python
"""Folds a trained LoRA (or another tuner of peft that can be merged) into the backbone's weights.

The result is a checkpoint of the stock config, with nothing left of the method: it costs nothing at inference.
"""

import argparse
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, init_default_scope

import e3va_mm  # noqa: F401  (first: it makes configs that derive from `mmseg::` loadable)
from e3va_mm.backbones.tuned import TunedBackbone
from e3va_mm.checkpoints.files import read_checkpoint, read_weights_only
from e3va_mm.checks import check_target
from e3va_mm.launch import set_scope


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config that was trained, with a TunedBackbone')
    parser.add_argument('checkpoint', help='its checkpoint')
    parser.add_argument('target', help='.pth file to write')
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='overrides of the config, key=value')
    return parser.parse_args()


def weights_of(backbone: dict) -> list[str]:
    """The files that a backbone's config names as its weights."""
    named = (backbone.get('checkpoint'), (backbone.get('init_cfg') or {}).get('checkpoint'))
    return [checkpoint for checkpoint in named if checkpoint]


def main() -> None:
    args = parse_args()
    read_weights_only()
    check_target('target', args.target, [args.config, args.checkpoint])
    config = Config.fromfile(args.config)
    config.merge_from_dict(args.cfg_options or {})
    set_scope(config)
    init_default_scope(config.default_scope)
    # In half precision, the weights would round most of the update away.
    config.model.backbone.pop('frozen_dtype', None)
    check_target('target', args.target, weights_of(config.model.backbone.backbone))
    model = MODELS.build(config.model)
    if not isinstance(model.backbone, TunedBackbone):
        raise ValueError(f'{args.config} has a {type(model.backbone).__name__}; only a TunedBackbone can be merged')
    checkpoint = read_checkpoint(args.checkpoint)
    # The base is not in the file, and the backbone checks its own keys.
    missing = model.load_state_dict(checkpoint['state_dict'], strict=False).missing_keys
    missing = [key for key in missing if not key.startswith('backbone.')]
    if missing:
        raise ValueError(f'{args.checkpoint} lacks {len(missing)} keys of the model, such as {missing[:3]}')
    model.backbone = model.backbone.merge()
    torch.save({'state_dict': model.state_dict(), 'meta': checkpoint.get('meta', {})}, args.target)
    print(f'{args.target}: {Path(args.target).stat().st_size / 2**20:.2f} MiB')


if __name__ == '__main__':
    main()
