#!/usr/bin/env python
"""Evaluates a checkpoint with any config of mmseg, mmdet or mmrotate; its default_scope says which toolbox runs it."""

import argparse
import inspect
from copy import deepcopy
from pathlib import Path

from mmengine.config import Config, ConfigDict
from mmengine.model import is_model_wrapper
from mmengine.registry import METRICS

from e3va_mm.checkpoints.files import read_checkpoint
from e3va_mm.checks import check_target
from e3va_mm.launch import (
    add_common_arguments,
    add_config_arguments,
    build_runner,
    check_data,
    end_distributed_run,
    leaf_datasets,
    load_config,
    parse_checkpoint,
    resolve_type,
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add_config_arguments(parser)
    parser.add_argument('--out', help='predictions: a folder for segmentation, a .pkl file for detection')
    parser.add_argument('--show', action='store_true', help='show predictions in a window')
    parser.add_argument('--show-dir', help='folder for pictures of the predictions')
    parser.add_argument('--wait-time', type=float, default=2, help='seconds between windows')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    add_common_arguments(parser)
    return parse_checkpoint(parser)


def show_predictions(config: Config, args: argparse.Namespace) -> None:
    hook = config.default_hooks.get('visualization')
    if hook is None:
        raise ValueError('--show and --show-dir need default_hooks.visualization in the config')
    hook.update(draw=True, show=args.show, wait_time=args.wait_time)
    if args.show_dir and config.default_scope != 'mmseg':
        hook.test_out_dir = args.show_dir
    elif args.show_dir:
        config.visualizer.save_dir = args.show_dir


def augment_test_time(config: Config) -> None:
    if config.default_scope == 'mmdet':
        config.setdefault('tta_model', default_detection_tta_model())
        config.setdefault('tta_pipeline', flipped(config.test_dataloader.dataset))
    missing = [key for key in ('tta_model', 'tta_pipeline') if key not in config]
    if missing:
        raise ValueError(f'--tta needs {missing} in the config')
    for _, dataset in leaf_datasets(config.test_dataloader.dataset, 'test_dataloader.dataset'):
        dataset.pipeline = config.tta_pipeline
    config.model = ConfigDict(**config.tta_model, module=config.model)


def default_detection_tta_model() -> dict:
    return dict(type='DetTTAModel', tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100))


def flipped(dataset: dict) -> list[dict]:
    """The test pipeline run twice, the second time mirrored."""
    _, dataset = next(leaf_datasets(dataset, 'dataset'))
    *transforms, pack = deepcopy(dataset['pipeline'])
    pack['meta_keys'] = (*pack.get('meta_keys', ()), 'flip', 'flip_direction')
    flips = [dict(type='RandomFlip', prob=1.0), dict(type='RandomFlip', prob=0.0)]
    return [*transforms, dict(type='TestTimeAug', transforms=[flips, [pack]])]


def check_merges_masks(runner) -> None:
    """mmdet merges boxes alone, and stops with an assertion at the first image that has masks."""
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    has_masks = any(name.endswith('mask_head') for name, _ in model.named_modules())
    if type(model).__name__ == 'DetTTAModel' and has_masks:
        name = type(model.module).__name__
        raise ValueError(f'--tta merges boxes only, and this {name} puts out masks: test it without --tta')


def check_outputs(config: Config, args: argparse.Namespace) -> None:
    """Predictions bear the names of the images, so they may not go where the images or their labels are.

    Raises:
        ValueError: names both places.
    """
    folders = []
    for _, dataset in leaf_datasets(config.test_dataloader.dataset, 'test_dataloader.dataset'):
        prefixes = (dataset.get('data_prefix') or {'': ''}).values()
        folders += [(Path(dataset.get('data_root') or '', prefix).resolve(), prefix) for prefix in prefixes]
    for option, target in (('--out', args.out), ('--show-dir', args.show_dir)):
        if target:
            check_target(option, target, [args.config, args.checkpoint, *(folder for folder, _ in folders)])
            # Without a prefix, the folder is the data set's own, and holds others besides images.
            inside = [folder for folder, prefix in folders if prefix and Path(target).resolve().is_relative_to(folder)]
            if inside:
                raise ValueError(f'{option} {target} would overwrite the inputs in {inside[0]}: choose another folder')


def write_masks(config: Config, folder: str) -> None:
    """Lets the evaluators that can write predictions do so."""
    evaluator = config.test_evaluator
    metrics = evaluator if isinstance(evaluator, (list, tuple)) else evaluator.get('metrics', [evaluator])
    is_written = False
    for metric in metrics:
        known = inspect.signature(resolve_type(METRICS, metric.type, config.default_scope)).parameters
        if 'output_dir' in known:
            metric.update(output_dir=folder, **({'keep_results': True} if 'keep_results' in known else {}))
            is_written = True
    if not is_written:
        raise ValueError(f'--out needs an evaluator with output_dir, such as IoUMetric; test_evaluator={evaluator}')


def dump_detections(runner, path: str) -> None:
    from mmdet.evaluation import DumpDetResults

    runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=path))


def main() -> None:
    args = parse_args()
    config = load_config(args)
    check_data(config, 'test_dataloader')
    is_detection = config.default_scope != 'mmseg'
    if args.out and is_detection and not args.out.endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out={args.out} must end in .pkl or .pickle for detection')
    check_outputs(config, args)
    if '://' not in args.checkpoint:
        read_checkpoint(args.checkpoint)  # Says clearly what is wrong with it before anything is built.
    config.load_from = args.checkpoint
    if args.show or args.show_dir:
        show_predictions(config, args)
    if args.tta:
        augment_test_time(config)
    if args.out and not is_detection:
        write_masks(config, args.out)
    runner = build_runner(config)
    if args.tta:
        check_merges_masks(runner)
    if args.out and is_detection:
        dump_detections(runner, args.out)
    runner.test()
    end_distributed_run()


if __name__ == '__main__':
    main()
