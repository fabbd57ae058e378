"""Batches of made-up data for any stock model: images, frames or branches, with what any head may ask for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

IMAGES, FRAMES, OBJECTS = 2, 2, 3
# Lines of a road, and images of persons, which have a shape of their own.
NOT_MADE = ('CLRNet', 'BaseReID')


class NoDataError(Exception):
    """A kind of model that no data is made for."""


def dicts_of(node: Any) -> Iterator[dict]:
    """A config's dicts, itself among them, wherever they stand."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ():
        yield from dicts_of(child)


def values_of(node: Any, key: str) -> Iterator[Any]:
    """All values under a key."""
    return (own[key] for own in dicts_of(node) if key in own)


def make_batch(model: dict, toolbox: str, pixels: int, training: bool) -> dict:
    """A collated batch, as a loader of the model's kind gives it: uint8 images and data samples.

    Args:
        model: the model's config, which says what kind of data it takes and how many classes there are.
        pixels: of an image's side.
        training: models of videos then take two of them, or images; all others the same as in a test.

    Raises:
        NoDataError: the model is of a kind that takes other data.
    """
    kind = str(model.get('type'))
    if kind in NOT_MADE:
        raise NoDataError(f'no data is made for {kind}')
    classes = min((count for count in values_of(model, 'num_classes') if type(count) is int), default=1)
    if toolbox == 'mmseg':
        return collate([_segmentation_sample(pixels, classes) for _ in range(IMAGES)])
    if kind == 'ImageClassifier':
        return collate([_classification_sample(pixels, classes) for _ in range(IMAGES)])
    stuff = _stuff_labels(model)
    samples = [_detection_sample(pixels, classes, stuff, frame) for frame in range(IMAGES)]
    if not any('mask' in key for own in dicts_of(model) for key in own):
        for _, sample in samples:
            del sample.gt_instances.masks  # which some assigners would take for the objects' shapes
    preprocessor = model.get('data_preprocessor') or {}
    if 'rpn_head' not in model:
        for _, sample in samples:
            sample.proposals = _proposals(sample.gt_instances.bboxes, pixels)
    preprocessing = str(preprocessor.get('type'))
    if 'Track' in preprocessing and not (training and preprocessor.get('use_det_processor')):
        videos = IMAGES if training else 1
        return collate([_video(pixels, classes, stuff) for _ in range(videos)])
    if 'MultiBranch' in preprocessing and training:
        branches = [collate(samples) for _ in range(3)]
        names = ('sup', 'unsup_teacher', 'unsup_student')
        return {part: {name: own[part] for name, own in zip(names, branches)} for part in ('inputs', 'data_samples')}
    return collate(samples)


def collate(samples: list[tuple[Tensor, Any]]) -> dict:
    return {'inputs': [image for image, _ in samples], 'data_samples': [sample for _, sample in samples]}


def _image(pixels: int, *leading: int) -> Tensor:
    return torch.randint(0, 256, (*leading, 3, pixels, pixels), dtype=torch.uint8)


def _stuff_labels(model: dict) -> tuple[int, int]:
    """The range of labels of semantic maps: the last few, which are no things where there are both."""
    heads = [head for key in ('semantic_head', 'panoptic_head') for head in values_of(model, key)]
    counts = [sum(n for key in ('num_things_classes', 'num_stuff_classes') for n in values_of(h, key)) for h in heads]
    total = min([*filter(None, counts), *(n for head in heads for n in values_of(head, 'num_classes'))], default=2)
    return max(0, total - 4), total


def _classification_sample(pixels: int, classes: int) -> tuple[Tensor, Any]:
    from mmpretrain.structures import DataSample

    return _image(pixels), DataSample().set_gt_label(torch.randint(0, classes, (1,)))


def _segmentation_sample(pixels: int, classes: int) -> tuple[Tensor, Any]:
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    shape = (1, pixels, pixels)
    sample = SegDataSample(
        gt_sem_seg=PixelData(data=torch.randint(0, classes, shape)),
        gt_edge_map=PixelData(data=torch.randint(0, 2, shape)),
        gt_depth_map=PixelData(data=10 * torch.rand(shape)),
    )
    sample.set_metainfo({**_metainfo(pixels), 'reduce_zero_label': False})
    return _image(pixels), sample


def _metainfo(pixels: int, frame: int = 0) -> dict:
    return {
        'img_id': frame,
        'frame_id': frame,
        'video_length': FRAMES,
        'ori_video_length': FRAMES,
        'img_path': 'none.png',
        'img_shape': (pixels, pixels),
        'ori_shape': (pixels, pixels),
        'pad_shape': (pixels, pixels),
        'scale_factor': (1.0, 1.0),
        'flip': False,
        'flip_direction': None,
        'homography_matrix': np.eye(3, dtype=np.float32),
        # CornerNet's; the whole image.
        'border': np.array([0, pixels, 0, pixels], dtype=np.float32),
        'text': ('cat', 'dog'),
        'custom_entities': True,
    }


def _detection_sample(pixels: int, classes: int, stuff: tuple[int, int], frame: int = 0) -> tuple[Tensor, Any]:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData, PixelData

    boxes = _boxes(pixels)
    sample = DetDataSample(
        gt_instances=_instances(boxes, classes, pixels),
        ignored_instances=InstanceData(bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)),
        gt_sem_seg=PixelData(sem_seg=torch.randint(*stuff, (1, pixels, pixels))),
    )
    sample.set_metainfo(_metainfo(pixels, frame))
    return _image(pixels), sample


def _instances(boxes: Tensor, classes: int, pixels: int):
    from mmdet.structures.mask import BitmapMasks
    from mmengine.structures import InstanceData

    masks = np.zeros((OBJECTS, pixels, pixels), dtype=np.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist()):
        mask[top:bottom, left:right] = 1
    return InstanceData(
        bboxes=boxes,
        # Text of two names stands for any number of classes.
        labels=torch.randint(0, min(classes, 2), (OBJECTS,)),
        masks=BitmapMasks(masks, pixels, pixels),
        instances_ids=torch.arange(OBJECTS),
    )


def _proposals(boxes: Tensor, pixels: int):
    from mmengine.structures import InstanceData

    return InstanceData(bboxes=torch.cat([boxes, _boxes(pixels)]), scores=torch.rand(2 * OBJECTS))


def _boxes(pixels: int) -> Tensor:
    """(OBJECTS, 4): a quarter to a half of the image wide and high, and within it."""
    sizes = pixels * (0.25 + 0.25 * torch.rand(OBJECTS, 2))
    corners = (pixels - sizes) * torch.rand(OBJECTS, 2)
    return torch.cat([corners, corners + sizes], 1)


def _video(pixels: int, classes: int, stuff: tuple[int, int]) -> tuple[Tensor, Any]:
    from mmdet.structures import TrackDataSample

    frames = [_detection_sample(pixels, classes, stuff, frame) for frame in range(FRAMES)]
    video = TrackDataSample(video_data_samples=[sample for _, sample in frames])
    video.set_metainfo({'key_frames_inds': [0], 'ref_frames_inds': [1], 'video_length': FRAMES})
    return torch.stack([image for image, _ in frames]), video
