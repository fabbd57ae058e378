"""Comparison methods behind one wrapper, so that the rows of a table differ by one dict."""

from __future__ import annotations

import copy

from mmengine.registry import MODELS
from torch import Tensor, nn

from ..checks import checks_options
from ..methods import build_method
from ..methods.peft_methods import PEFT, merge
from .base import FrozenBackbone


@MODELS.register_module()
@checks_options
class TunedBackbone(FrozenBackbone):
    """A stock backbone under a comparison method.

    Args:
        backbone: config of a stock backbone, its ``init_cfg`` included.
        method: ``dict(type=..., **options)``, a method of :mod:`e3va_mm.methods`.
        frozen_dtype, init_cfg: see :class:`FrozenBackbone`.

    Raises:
        ValueError: ``method`` is unknown or carries unknown options, or ``frozen_dtype`` is not for it.
    """

    def __init__(
        self, backbone: dict | nn.Module, method: dict, frozen_dtype: str | None = None, init_cfg: dict | None = None
    ) -> None:
        super().__init__(backbone, frozen_dtype, init_cfg)
        # On the host, where it takes no room of the device's.
        stock = copy.deepcopy(self.backbone).cpu()
        self._stock_names = super().stock_names()
        self.method = build_method(self.family, method)
        if self._quantised_dtype and isinstance(self.method, PEFT):
            name = type(self.method).__name__
            raise ValueError(f"frozen_dtype={frozen_dtype!r} is not for {name}, which wraps layers: take 'bfloat16'")
        self.method.inject(self.backbone)
        # Weights are loaded by their stock names; where those are gone, a stock module is kept until the first forward.
        self._stock = [stock] if list(stock.state_dict()) != list(self.backbone.state_dict()) else []
        self.trains_base = self.method.trains_backbone
        self.freeze_base(self.method.trained_names(self.backbone))

    def stock_names(self) -> list[str]:
        # Adapters that are injected into the backbone are among its parameters by now.
        return self._stock_names

    def _staging(self) -> nn.Module:
        return copy.deepcopy(self._stock[0]) if self._stock else super()._staging()

    def _stock_module(self) -> nn.Module:
        return self._stock[0] if self._stock else super()._stock_module()

    def _adopt(self, staging: nn.Module) -> None:
        # Some of peft's tuners start from the base weights, so they are set up once more, on the loaded ones.
        self.method.inject(staging)
        super()._adopt(staging)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """images (B, 3, H, W) -> feature maps as the stock backbone's, (B, C_s, H_s, W_s) each."""
        self._stock.clear()
        with self.frozen_forward(images):
            returned = self.method.run(self.family, images)
        maps = [self.restore_dtype(output) for output in self.family.returned_maps(returned, images)]
        return self.family.show(maps, images, self.training)

    def merge(self) -> nn.Module:
        """The stock backbone with the method's updates folded into its weights; changes this module.

        Raises:
            ValueError: the method is none of peft's, or ``frozen_dtype`` has rounded the weights.
        """
        if not isinstance(self.method, PEFT):
            raise ValueError(f'method {type(self.method).__name__} can not be merged, only LoRA and PEFT can')
        if self.frozen_dtype:
            raise ValueError(f'frozen_dtype={self.frozen_dtype} would round the updates away: merge without it')
        return merge(self.backbone)
