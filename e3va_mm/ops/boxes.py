"""Suppression of overlapping boxes, and Soft-NMS (https://arxiv.org/abs/1704.04503). Boxes are x1, y1, x2, y2."""

import numpy as np
import torch
from torch import Tensor

from .common import torchvision_has, wide

_BLOCK = 512  # boxes decided at a time: their overlaps with those that stay are one matrix


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Which boxes stay, the best first; of equal ones the first.

    boxes: (N, 4); offset is 1 where x2 and y2 are the last pixels inside.
    """
    boxes = wide(boxes)
    boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    # Compiled mmcv takes the threshold in fp32, which decides for an overlap that is exactly the threshold.
    iou_threshold = float(np.float32(iou_threshold))
    if torchvision_has('nms', boxes):
        return torch.ops.torchvision.nms(boxes, scores.to(boxes.dtype), iou_threshold)
    order = scores.argsort(stable=True, descending=True)
    return _suppress(boxes, order, iou_threshold)


def _suppress(boxes: Tensor, order: Tensor, iou_threshold: float) -> Tensor:
    kept = order[:0]
    for block in order.split(_BLOCK):
        free = ~(_overlaps(boxes[kept], boxes[block]) > iou_threshold).any(0)
        block = block[free]
        beats = (_overlaps(boxes[block], boxes[block]) > iou_threshold).triu(1)
        kept = torch.cat((kept, block[_unbeaten(beats)]))
    return kept


def _unbeaten(beats: Tensor) -> Tensor:
    """Who is beaten by none that stays: (n, n) → (n,). A round settles at least one more from the front."""
    stay = beats.new_ones(len(beats))
    while True:
        after = ~(beats & stay[:, None]).any(0)
        if torch.equal(after, stay):
            return stay
        stay = after


def _overlaps(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union: (N, 4), (M, 4) → (N, M); of two empty boxes it is no number, and they both stay."""
    low = torch.maximum(first[:, None, :2], second[:, :2])
    high = torch.minimum(first[:, None, 2:], second[:, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (first, second)]
    return common / (areas[0][:, None] + areas[1] - common)


def softnms(boxes, scores, dets, iou_threshold, sigma, min_score, method, offset) -> Tensor:
    """Writes boxes and lowered scores to dets (N, 5), the best first, and returns which they are.

    method: 0 drops what overlaps, 1 lowers its score linearly, 2 by a Gaussian. Tensors are on the CPU.
    """
    left = wide(torch.cat((boxes[:, :2], boxes[:, 2:] + offset, scores[:, None]), dim=1)).numpy().copy()
    which = np.arange(len(left))
    done = 0
    while done < len(left):
        best = done + int(left[done:, 4].argmax())
        for array in (left, which):
            array[[done, best]] = array[[best, done]]
        rest = left[done + 1 :]
        rest[:, 4] *= _lower(left[done], rest, iou_threshold, sigma, method)
        stays = _close_gaps(rest[:, 4] >= min_score)
        left = np.concatenate((left[: done + 1], rest[stays]))
        which = np.concatenate((which[: done + 1], which[done + 1 :][stays]))
        done += 1
    inds = torch.from_numpy(which)
    dets[: len(inds)] = torch.cat((boxes[inds], torch.from_numpy(left[:, 4:]).to(dets.dtype)), dim=1)
    return inds


def _lower(box: np.ndarray, rest: np.ndarray, iou_threshold: float, sigma: float, method: int) -> np.ndarray:
    overlap = _overlaps(torch.from_numpy(box[None, :4]), torch.from_numpy(rest[:, :4]))[0].nan_to_num(0).numpy()
    if method == 2:
        return np.exp(-(overlap**2) / sigma)
    return np.where(overlap >= np.float32(iou_threshold), 1 - overlap if method == 1 else 0, 1).astype(rest.dtype)


def _close_gaps(stays: np.ndarray) -> np.ndarray:
    """Order of those that stay: each gap is filled by the last of them, which decides among equal scores later."""
    order = np.arange(stays.sum())
    gaps = order[~stays[: len(order)]]
    order[gaps] = np.flatnonzero(stays[len(order) :])[::-1] + len(order)
    return order
