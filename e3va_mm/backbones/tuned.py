"""Comparison methods behind one wrapper, so that the rows of a table differ by one dict."""

from __future__ import annotations

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from .base import FrozenBackbone

METHODS = ('Frozen',)


@MODELS.register_module()
class TunedBackbone(FrozenBackbone):
    """A stock backbone under a comparison method; full fine-tuning is the stock config itself.

    Args:
        backbone: config of a stock backbone, its ``init_cfg`` included.
        method: ``dict(type='Frozen')``: nothing in the backbone is trained and no gradient enters it.
        frozen_dtype, init_cfg: see :class:`FrozenBackbone`.

    Raises:
        ValueError: ``method`` is unknown or carries unknown options.
    """

    def __init__(
        self,
        backbone: dict | nn.Module,
        method: dict,
        frozen_dtype: str | None = None,
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(backbone, frozen_dtype, init_cfg)
        if method.get('type') not in METHODS or len(method) > 1:
            raise ValueError(f'method must be dict(type=...) with a type of {METHODS}, got {dict(method)}')
        self.freeze_base()

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images (B, 3, H, W) -> the stock feature maps, (B, C_s, H_s, W_s) each, without gradient."""
        with self.frozen_forward(images):
            return tuple(self.restore_dtype(output) for output in self.backbone(images))
