import json

import cv2
import numpy as np
import pytest

from benchmarks.shapes import CLASSES, write_shapes

pycocotools = pytest.importorskip('pycocotools.coco')


def test_deterministic_and_only_written_once(tmp_path):
    splits = {'train': 3, 'val': 2}
    for name in ('first', 'second'):
        write_shapes(tmp_path / name, image_size=48, splits=splits)
    for file in sorted((tmp_path / 'first').rglob('*.*')):
        assert file.read_bytes() == (tmp_path / 'second' / file.relative_to(tmp_path / 'first')).read_bytes()
    victim = tmp_path / 'first/images/train/0000.png'
    victim.unlink()
    write_shapes(tmp_path / 'first', image_size=48, splits=splits)
    assert not victim.exists()
    write_shapes(tmp_path / 'first', image_size=48, splits=splits, seed=1)
    assert victim.read_bytes() != (tmp_path / 'second/images/train/0000.png').read_bytes()


def test_instances_and_semantic_masks_agree(shapes):
    coco = pycocotools.COCO(str(shapes / 'annotations/instances_train.json'))
    assert [category['name'] for category in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for image in coco.loadImgs(coco.getImgIds()):
        labels = cv2.imread(str(shapes / 'masks/train' / image['file_name']), cv2.IMREAD_GRAYSCALE)
        assert labels.shape == (image['height'], image['width']) and labels.max() <= len(CLASSES)
        for annotation in coco.loadAnns(coco.getAnnIds(image['id'])):
            mask = coco.annToMask(annotation).astype(bool)
            assert np.mean(labels[mask] == annotation['category_id']) > 0.85
            x, y, width, height = annotation['bbox']
            assert min(width, height) > 0 and x + width <= image['width'] and y + height <= image['height']


def test_standard_keys(shapes):
    content = json.loads((shapes / 'annotations/instances_val.json').read_text())
    assert set(content) == {'images', 'annotations', 'categories'}
    assert {'id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd', 'segmentation'} == set(
        content['annotations'][0]
    )
