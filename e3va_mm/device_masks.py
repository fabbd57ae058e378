"""Ground-truth masks that are on the device once, however many heads crop them; imports mmdet."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from mmcv.ops import roi_align
from mmdet.structures.mask import BitmapMasks
from torch import Tensor


class DeviceMasks(BitmapMasks):
    """Bitmaps whose crops are the stock ones to the bit, at less cost.

    The stock class moves all masks of an image from the host at each crop, thrice a step under a cascade of three
    heads, and there makes a float map of each box. This one moves them at the first crop and keeps them as they are,
    a byte a pixel, for the others; and makes a float map of each mask that a box asks for, which its boxes share.
    On a CPU nothing is moved.

    Everything but :meth:`crop_and_resize` is stock, and what it returns are stock masks. ``masks`` must not be
    changed after the first crop.

    Args:
        masks: (N, H, W); not copied.
        height, width: of the masks.
    """

    def __init__(self, masks: np.ndarray | list[np.ndarray], height: int, width: int) -> None:
        super().__init__(masks, height, width)
        self._moved: Tensor | None = None

    def __getstate__(self) -> dict:
        """What copies and other processes get: they move masks themselves."""
        return {**self.__dict__, '_moved': None}

    @classmethod
    def cat(cls, masks: Sequence[BitmapMasks]) -> BitmapMasks:
        # An InstanceData that is indexed asks it of masks that are stock by then.
        return BitmapMasks.cat(masks)

    def crop_and_resize(
        self, bboxes, out_shape, inds, device='cpu', interpolation='bilinear', binarize=True
    ) -> BitmapMasks:
        """Masks ``inds`` (K) in the ``bboxes`` (K, 4) -> (K, H, W), bool if ``binarize``; ``out_shape`` is H, W."""
        if not len(self) or not len(bboxes):
            return super().crop_and_resize(bboxes, out_shape, inds, device, interpolation, binarize)
        moved = torch.from_numpy(self.masks) if self._moved is None else self._moved
        self._moved = moved.to(device)
        bboxes, inds = (torch.as_tensor(each).cpu() for each in (bboxes, inds))
        asked, index = inds.unique(return_inverse=True)
        rois = torch.cat([index[:, None].to(bboxes.dtype), bboxes], dim=1).to(device)
        maps = self._moved.index_select(0, asked.to(device)).to(rois.dtype)
        crops = roi_align(maps[:, None], rois, out_shape, 1.0, 0, 'avg', True).squeeze(1)
        crops = crops >= 0.5 if binarize else crops
        return BitmapMasks(crops.cpu().numpy(), *out_shape)


def move_masks_once(samples: Iterable) -> None:
    """Gives each image of a batch :class:`DeviceMasks`, not yet moved; polygons and subclasses of others stay.

    Args:
        samples: mmdet's, those of videos among them; those without masks stay as they are.
    """
    for sample in samples:
        for image in getattr(sample, 'video_data_samples', [sample]):
            masks = getattr(getattr(image, 'gt_instances', None), 'masks', None)
            if type(masks) in (BitmapMasks, DeviceMasks):
                image.gt_instances.masks = DeviceMasks(masks.masks, masks.height, masks.width)
