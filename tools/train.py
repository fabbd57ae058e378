#!/usr/bin/env python
"""Trains any config of mmseg, mmdet or mmrotate; the config's default_scope decides which toolbox runs it."""

import argparse
from pathlib import Path

from mmengine.config import Config
from mmengine.logging import print_log

from e3va_mm.checkpoints.files import read_checkpoint
from e3va_mm.checkpoints.latest import latest_checkpoint
from e3va_mm.launch import (
    add_common_arguments,
    add_config_arguments,
    build_runner,
    check_base_weights,
    check_data,
    enable_amp,
    end_distributed_run,
    load_config,
    run_float32_ops,
)
from e3va_mm.tune import name_bases


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('--amp', action='store_true', help='automatic mixed precision (CUDA)')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate with the batch size')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from CHECKPOINT, or, without one, from the newest whole one of the last run in the work dir',
    )
    parser.add_argument('--random-base', action='store_true', help='train beside a frozen backbone without weights')
    add_common_arguments(parser)
    return parser.parse_args()


def set_resume(config: Config, checkpoint: str) -> None:
    """Points the config at the checkpoint to continue from; a fresh start if there is none yet."""
    if checkpoint == 'auto':
        checkpoint = latest_checkpoint(config.work_dir, checkpoint_folder(config))
        if checkpoint is None:
            print_log(f'--resume: no checkpoint in {config.work_dir} yet, starting from the beginning', 'current')
            config.resume = False
            return
    config.resume, config.load_from = True, str(checkpoint)


def checkpoint_folder(config: Config) -> Path:
    """Where the checkpoint hook saves: with an ``out_dir``, in a folder of the work dir's name there."""
    work_dir = Path(config.work_dir).resolve()
    out_dir = Path((config.default_hooks.checkpoint or {}).get('out_dir') or work_dir)
    return out_dir if out_dir == work_dir else out_dir / work_dir.name


def scale_learning_rate(config: Config) -> None:
    if 'base_batch_size' not in config.get('auto_scale_lr', {}):
        raise ValueError('--auto-scale-lr needs auto_scale_lr=dict(base_batch_size=...) in the config')
    config.auto_scale_lr.enable = True


def main() -> None:
    args = parse_args()
    config = load_config(args)
    check_data(config, 'train_dataloader', 'val_dataloader')
    if args.amp:
        enable_amp(config)
    run_float32_ops(config)
    if args.auto_scale_lr:
        scale_learning_rate(config)
    if args.resume or (config.get('resume') and not config.get('load_from')):
        set_resume(config, args.resume or 'auto')
    if config.get('load_from') and '://' not in config.load_from:
        read_checkpoint(config.load_from)  # Says clearly what is wrong with it before anything is built.
    name_bases(config, download=True)
    runner = build_runner(config)
    if not args.random_base:
        check_base_weights(runner.model)
    runner.train()
    end_distributed_run()


if __name__ == '__main__':
    main()
