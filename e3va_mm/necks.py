"""A feature pyramid on maps of one resolution."""

from __future__ import annotations

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from torch import Tensor, nn

SCALES = (4, 2, 1, 0.5)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Maps at several strides from the maps of a plain vision transformer (ViTDet, arXiv 2203.16527).

    Each level is scaled by transposed convolutions (2, 4), nothing (1) or max-pooling (0.5), then a 1 x 1 and a 3 x 3
    convolution with norms bring it to ``out_channels``. Deviation: given one map a level, as transformers tapped at
    several depths return them, each level starts from its own; given a single one, all start from it, as in the paper.

    Args:
        in_channels: of each incoming map; one entry, or as many as ``scales``.
        out_channels: of all outgoing maps.
        scales: of the outgoing maps, relative to the incoming ones.
        num_outs: levels to return; those beyond ``scales`` are max-pooled from the last, as RetinaNet wants.
        init_cfg: mmengine initialisation.

    Raises:
        ValueError: the numbers of maps and scales do not go together, or a scale is none of 4, 2, 1, 0.5.
    """

    def __init__(
        self,
        in_channels: list[int],
        out_channels: int = 256,
        scales: tuple[float, ...] = SCALES,
        num_outs: int | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        if not set(scales) <= set(SCALES):
            raise ValueError(f'scales must be some of {SCALES}, got {scales!r}')
        if len(in_channels) not in (1, len(scales)):
            raise ValueError(f'in_channels={in_channels!r} must have one entry or {len(scales)}, as scales={scales!r}')
        self.num_outs = num_outs or len(scales)
        if self.num_outs < len(scales):
            raise ValueError(f'num_outs={num_outs} is less than the number of scales={scales!r}')
        channels = in_channels if len(in_channels) > 1 else in_channels * len(scales)
        self.levels = nn.ModuleList(_level(dims, out_channels, scale) for dims, scale in zip(channels, scales))

    def forward(self, features: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Maps (B, C, H, W), one or one a level -> (B, out_channels, scale * H, scale * W) each."""
        given = features if len(features) > 1 else tuple(features) * len(self.levels)
        outputs = [level(feature) for level, feature in zip(self.levels, given, strict=True)]
        while len(outputs) < self.num_outs:
            outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return tuple(outputs)


def _level(dims: int, out_channels: int, scale: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    if scale == 0.5:
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    while scale > 1:
        # Both widths halve with each step, as in the paper.
        layers += [nn.ConvTranspose2d(dims, dims // 2, 2, stride=2), _norm(dims // 2), nn.GELU()]
        dims, scale = dims // 2, scale / 2
    layers += [nn.Conv2d(dims, out_channels, 1, bias=False), _norm(out_channels)]
    layers += [nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False), _norm(out_channels)]
    return nn.Sequential(*layers)


def _norm(channels: int) -> nn.Module:
    """Layer norm over all of a map; works at batch 1 and without synchronisation."""
    return nn.GroupNorm(1, channels)
