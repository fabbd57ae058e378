"""Choosing on held-out data: a data set's training part in two, and each method's best learning rates on the second.

The split that is reported must not choose: the last fifth of the training images, in the order of their names (so that
neighbouring frames of a video stay together), validates what the other four fifths train.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from experiments import ROOT
from mmengine.config import Config
from summarize import group_runs, values_of

import e3va_mm  # noqa: F401  (makes configs that derive from `mmseg::` loadable)


def hold_out(config: str) -> list[str]:
    """Writes the two parts as annotation files into ``held_out`` in the data set's folder.

    Args:
        config: path of a config, in the repository or absolute; its training data are a BaseSegDataset, VOCDataset or
            CocoDataset.

    Returns:
        Overrides for ``--cfg-options`` that train on the first part and validate on the second.

    Raises:
        FileNotFoundError: the data are not there.
    """
    dataset = Config.fromfile(ROOT / config).train_dataloader.dataset
    root = ROOT / dataset.data_root
    if not root.is_dir():
        raise FileNotFoundError(f'train_dataloader.dataset.data_root={dataset.data_root!r} of {config} is no folder')
    (root / 'held_out').mkdir(exist_ok=True)
    train, val = _WRITERS[dataset.type](dataset, root)
    options = [f'train_dataloader.dataset.ann_file={train}', f'val_dataloader.dataset.ann_file={val}']
    options += [f'val_dataloader.dataset.data_prefix.{key}={value}' for key, value in dataset.data_prefix.items()]
    if dataset.type == 'CocoDataset':
        options.append(f'val_evaluator.ann_file={Path(dataset.data_root, val)}')
    return options


def ranked_rates(content: dict) -> dict[tuple[str, str], list[float]]:
    """``{(data set, method): learning rates}`` in a result file of run_grid.py: those with the most seeds first, and of
    these the best mean metric."""
    ranked = {}
    for dataset, methods in group_runs(content).items():
        for method, runs in methods.items():
            values: dict[float, list[float]] = {}
            for run in runs:
                if run.get('learning_rate'):
                    values.setdefault(run['learning_rate'], []).extend(values_of(dataset, [run]))
            if values:
                ranked[dataset, method] = sorted(
                    values, key=lambda rate: (-len(values[rate]), -statistics.mean(values[rate]), rate)
                )
    return ranked


def _split(items: list) -> tuple[list, list]:
    cut = len(items) * 4 // 5
    return items[:cut], items[cut:]


def _write_names(root: Path, names: list[str]) -> list[str]:
    paths = ['held_out/train.txt', 'held_out/val.txt']
    for path, part in zip(paths, _split(sorted(names))):
        (root / path).write_text('\n'.join(part) + '\n')
    return paths


def _split_folder(dataset: dict, root: Path) -> list[str]:
    return _write_names(root, [path.stem for path in (root / dataset.data_prefix.img_path).iterdir()])


def _split_list(dataset: dict, root: Path) -> list[str]:
    return _write_names(root, (root / dataset.ann_file).read_text().split())


def _split_coco(dataset: dict, root: Path) -> list[str]:
    content = json.loads((root / dataset.ann_file).read_text())
    paths = ['held_out/train.json', 'held_out/val.json']
    for path, images in zip(paths, _split(sorted(content['images'], key=lambda image: image['file_name']))):
        ids = {image['id'] for image in images}
        annotations = [annotation for annotation in content['annotations'] if annotation['image_id'] in ids]
        (root / path).write_text(json.dumps({**content, 'images': images, 'annotations': annotations}))
    return paths


_WRITERS = {'BaseSegDataset': _split_folder, 'VOCDataset': _split_list, 'CocoDataset': _split_coco}
