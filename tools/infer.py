#!/usr/bin/env python
"""Draws a model's masks or boxes on an image, or on every image of a folder."""

import argparse
from pathlib import Path

import mmcv
import torch
from mmengine.registry import VISUALIZERS, init_default_scope

import e3va_mm  # noqa: F401  (first: it makes configs that derive from `mmseg::` loadable)
from e3va_mm.checkpoints.comparison import check_fits
from e3va_mm.checkpoints.files import read_checkpoint
from e3va_mm.checks import check_target
from e3va_mm.launch import add_config_arguments, load_model, parse_checkpoint, read_config

IMAGES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('image', help='image file or folder of images')
    add_config_arguments(parser)
    parser.add_argument('--out-dir', required=True, help='folder for the pictures')
    parser.add_argument('--device', default='cuda:0' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--score-thr', type=float, default=0.3, help='lowest score of a box that is drawn')
    return parse_checkpoint(parser)


def find_images(path: str) -> list[Path]:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f'image {path} does not exist')
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES) if path.is_dir() else [path]
    if not images:
        raise FileNotFoundError(f'folder {path} holds no image ({", ".join(IMAGES)})')
    return images


def targets_of(images: list[Path], out_dir: str) -> list[Path]:
    """Where each picture goes: ``NAME.png``, or ``NAME.jpg.png`` where images differ by their suffix alone."""
    stems = [path.stem for path in images]
    names = [path.stem if stems.count(path.stem) == 1 else path.name for path in images]
    targets = [Path(out_dir, f'{name}.png') for name in names]
    for target in targets:
        check_target('the picture', target, images)
    return targets


def main() -> None:
    args = parse_args()
    images = find_images(args.image)
    targets = targets_of(images, args.out_dir)
    config = read_config(args.config, args.cfg_options, args.tune)
    checkpoint = read_checkpoint(args.checkpoint)  # Says clearly what is wrong with it before anything is built.
    init_default_scope(config.default_scope)
    model, infer = load_model(config, args.checkpoint, args.device)
    check_fits(model, checkpoint)
    visualizer = VISUALIZERS.build({**config.visualizer, 'alpha': 0.5})
    visualizer.dataset_meta = model.dataset_meta
    options = {'pred_score_thr': args.score_thr} if config.default_scope != 'mmseg' else {'with_labels': False}
    for path, target in zip(images, targets):
        visualizer.add_datasample(
            path.name,
            mmcv.imread(path, channel_order='rgb'),
            data_sample=infer(model, str(path)),
            draw_gt=False,
            out_file=str(target),
            **options,
        )
        print(target)


if __name__ == '__main__':
    main()
