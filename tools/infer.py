#!/usr/bin/env python
"""Draws the masks or boxes of a model, or of several, on an image, or on every image of a folder."""

import argparse
from collections.abc import Callable
from pathlib import Path

import mmcv
import torch
from mmengine.config import Config
from mmengine.registry import VISUALIZERS, DefaultScope, init_default_scope
from torch import nn

from e3va_mm import SharedInferencer  # first: the package makes configs that derive from `mmseg::` loadable
from e3va_mm.checks import check_target
from e3va_mm.launch import add_config_arguments, load_model, parse_checkpoint, read_config
from e3va_mm.shared import free_name

IMAGES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('image', help='image file or folder of images')
    add_config_arguments(parser, is_required=False)
    parser.add_argument(
        '--model',
        nargs='+',
        action='append',
        metavar=('CONFIG', 'CHECKPOINT'),
        help='in place of config and checkpoint, and several times: models that share one frozen pass; '
        'pictures go to a folder each',
    )
    parser.add_argument('--out-dir', required=True, help='folder for the pictures')
    parser.add_argument('--device', default='cuda:0' if torch.cuda.is_available() else 'cpu')
    parser.add_argument('--score-thr', type=float, default=0.3, help='lowest score of a box that is drawn')
    args = parse_checkpoint(parser)
    if bool(args.model) == bool(args.config):
        parser.error('give CONFIG CHECKPOINT, or --model CONFIG CHECKPOINT for each of several models')
    if any(len(model) > 2 for model in args.model or ()):
        parser.error('--model takes a config and a checkpoint, or a checkpoint alone; the image comes before')
    return args


def find_images(path: str) -> list[Path]:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f'image {path} does not exist')
    images = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGES) if path.is_dir() else [path]
    if not images:
        raise FileNotFoundError(f'folder {path} holds no image ({", ".join(IMAGES)})')
    return images


def targets_of(images: list[Path], out_dir: str | Path) -> list[Path]:
    """Where each picture goes: ``NAME.png``, or ``NAME.jpg.png`` where images differ by their suffix alone."""
    stems = [path.stem for path in images]
    names = [path.stem if stems.count(path.stem) == 1 else path.name for path in images]
    targets = [Path(out_dir, f'{name}.png') for name in names]
    for target in targets:
        check_target('the picture', target, images)
    return targets


def names_of(models: list[list[str]]) -> list[str]:
    """Of models that share a pass: as their files are called."""
    names = []
    for config, *_ in models:
        names.append(free_name(Path(config).stem, names))
    return names


def open_models(args: argparse.Namespace, names: list[str]) -> tuple[dict[str, tuple[Config, nn.Module]], Callable]:
    """The models by their names, and what applies them to the path of an image: samples by these names."""
    if args.model:
        infer = SharedInferencer(device=args.device)
        for name, (config, *checkpoint) in zip(names, args.model):
            infer.add(read_config(config, args.cfg_options, args.tune), *(checkpoint or [config]), name=name)
        return {name: (task.config, task.model) for name, task in infer.tasks.items()}, infer
    config = read_config(args.config, args.cfg_options, args.tune)
    init_default_scope(config.default_scope)
    model, apply = load_model(config, args.checkpoint, args.device)
    return {'': (config, model)}, lambda path: {'': apply(model, path)}


def build_visualizer(name: str, config: Config, model: nn.Module) -> Callable:
    """What draws a sample of a model: its toolbox's ``add_datasample``."""
    with DefaultScope.overwrite_default_scope(config.default_scope):
        # Of one name there is one visualizer.
        visualizer = VISUALIZERS.build({**config.visualizer, 'name': name or 'visualizer', 'alpha': 0.5})
    visualizer.dataset_meta = model.dataset_meta
    return visualizer.add_datasample


def main() -> None:
    args = parse_args()
    images = find_images(args.image)
    names = names_of(args.model) if args.model else ['']
    targets = {name: targets_of(images, Path(args.out_dir, name)) for name in names}
    models, infer = open_models(args, names)
    visualizers = {name: build_visualizer(name, *model) for name, model in models.items()}
    for index, path in enumerate(images):
        image = mmcv.imread(path, channel_order='rgb')
        for name, sample in infer(str(path)).items():
            is_segmentor, target = models[name][0].default_scope == 'mmseg', targets[name][index]
            options = {'with_labels': False} if is_segmentor else {'pred_score_thr': args.score_thr}
            visualizers[name](path.name, image, data_sample=sample, draw_gt=False, out_file=str(target), **options)
            print(target)


if __name__ == '__main__':
    main()
