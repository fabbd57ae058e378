"""Choosing on held-out data: a data set's training part in two, and each method's best learning rates on the second.

The split that is reported must not choose: a fifth of the training images validates what the other four fifths train.
It is a fifth in the order of their names, so that neighbouring frames of a video stay together; the last unless said
otherwise.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

from mmengine.config import Config

from benchmarks.accuracy import group_runs, runs_by_rate, values_of
from benchmarks.training import ROOT

FOLDS = range(5)


def hold_out(config: str, fold: int = FOLDS[-1]) -> list[str]:
    """Writes the two parts as annotation files into ``held_out`` in the data set's folder.

    Args:
        config: path of a config, in the repository or absolute; its training data are a BaseSegDataset, XMLDataset or
            CocoDataset.
        fold: which fifth is held out.

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
    suffix = 'json' if dataset.type == 'CocoDataset' else 'txt'
    # A fold of its own has files of its own, so that grids of several can run beside one another.
    train, val = paths = [f'held_out/fold{fold}_{part}.{suffix}' for part in ('train', 'val')]
    for path, text in zip(paths, _PARTS[dataset.type](dataset, root, fold)):
        # Other grids' runs may be reading it.
        if not (root / path).is_file() or (root / path).read_text() != text:
            (root / path).write_text(text)
    options = [f'train_dataloader.dataset.ann_file={train}', f'val_dataloader.dataset.ann_file={val}']
    options += [f'val_dataloader.dataset.data_prefix.{key}={value}' for key, value in dataset.data_prefix.items()]
    if dataset.type == 'CocoDataset':
        options.append(f'val_evaluator.ann_file={Path(dataset.data_root, val)}')
    return options


def ranked_rates(content: dict) -> dict[tuple[str, str], list[float]]:
    """``{(data set, method): learning rates}`` in a result file of grid.py: those with the most seeds first, and of
    these the best mean metric."""
    ranked = {}
    for dataset, methods in group_runs(content).items():
        for method, runs in methods.items():
            values = {rate: values_of(dataset, own) for rate, own in runs_by_rate(runs).items() if rate}
            if values:
                ranked[dataset, method] = sorted(
                    values, key=lambda rate: (-len(values[rate]), -statistics.mean(values[rate]), rate)
                )
    return ranked


def _split(items: list, fold: int) -> tuple[list, list]:
    start, stop = (len(items) * edge // len(FOLDS) for edge in (fold, fold + 1))
    return items[:start] + items[stop:], items[start:stop]


def _parts_of_names(names: list[str], fold: int) -> list[str]:
    return ['\n'.join(part) + '\n' for part in _split(sorted(names), fold)]


def _parts_of_coco(dataset: dict, root: Path, fold: int) -> list[str]:
    content = json.loads((root / dataset.ann_file).read_text())
    parts = []
    for images in _split(sorted(content['images'], key=lambda image: image['file_name']), fold):
        ids = {image['id'] for image in images}
        annotations = [annotation for annotation in content['annotations'] if annotation['image_id'] in ids]
        parts.append(json.dumps({**content, 'images': images, 'annotations': annotations}))
    return parts


_PARTS = {
    'BaseSegDataset': lambda dataset, root, fold: _parts_of_names(
        [path.stem for path in (root / dataset.data_prefix.img_path).iterdir()], fold
    ),
    'XMLDataset': lambda dataset, root, fold: _parts_of_names((root / dataset.ann_file).read_text().split(), fold),
    'CocoDataset': _parts_of_coco,
}
