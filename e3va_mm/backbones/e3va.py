"""E³VA as an OpenMMLab backbone (arXiv 2306.09729)."""

from __future__ import annotations

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..highway import StageHighway
from .base import FrozenBackbone, parse_dtype

_SAVED_DTYPES = {
    None: None,
    'bfloat16': torch.bfloat16,
    'float8_e4m3fn': getattr(torch, 'float8_e4m3fn', None),
}
_ADAPTER_OPTIONS = ('rank', 'branches', 'hidden_ratio')


@MODELS.register_module()
class E3VABackbone(FrozenBackbone):
    """A frozen backbone with a trainable highway beside it; the loss gradient never enters a backbone block.

    With ``x`` the frozen tokens and ``delta_k`` the adapter of tap ``k``, a stage ends in
    ``h = x_end + (h_start - x_start) + sum_k delta_k(tap_k)``; its output is ``norm(h)``, with the backbone's own
    output norm, trained, and the next stage starts from the backbone's own (frozen) downsampling of ``h``.

    Args:
        backbone: config of a stock mmseg or mmdet ``SwinTransformer`` of any size, its ``init_cfg`` included.
        adapter: ``rank`` (8), ``branches`` (2) and ``hidden_ratio`` (0.5) of the low-rank adapters. The defaults are
            the paper's: 1,197,312 parameters for Swin-B, 1,792,896 for Swin-L.
        frozen_dtype: 'float16' or 'bfloat16' halves the memory of the frozen weights and speeds their forward up.
        saved_dtype: 'bfloat16' or 'float8_e4m3fn' is what the backward pass keeps of the taps. The forward pass
            stays exact; one of seven weight gradients sees the rounding.
        init: 'zero' starts exactly at the frozen backbone; 'kaiming' draws all factors.
        init_cfg: see :class:`FrozenBackbone`.

    Raises:
        ValueError: an option is unknown or outside its range.
        KeyError, TypeError: ``backbone`` is of an unknown or unsupported type.
    """

    def __init__(
        self,
        backbone: dict | nn.Module,
        adapter: dict | None = None,
        frozen_dtype: str | None = None,
        saved_dtype: str | None = None,
        init: str = 'zero',
        init_cfg: dict | None = None,
    ) -> None:
        super().__init__(backbone, frozen_dtype, init_cfg)
        options = dict(adapter or {}, init=init, saved_dtype=_parse_saved_dtype(saved_dtype))
        _check_option_names(adapter or {})
        stages = zip(self.taps.num_taps, self.taps.embed_dims)
        self.highway = nn.ModuleList(StageHighway(num_taps, dims, **options) for num_taps, dims in stages)
        norms = (self.backbone.get_submodule(name) for name in self.taps.norm_names)
        self.norms = dict(zip(self.taps.out_indices, norms))
        self.freeze_base(
            trained={
                f'{name}.{parameter}'
                for name in self.taps.norm_names
                for parameter, _ in self.backbone.get_submodule(name).named_parameters()
            }
        )

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The adapters' parameters by name; with the output norms, all that is trained here."""
        return {f'highway.{name}': parameter for name, parameter in self.highway.named_parameters()}

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of the highway.

        Args:
            images: (B, 3, H, W), any height and width.

        Returns:
            One (B, C_s, H_s, W_s) a stage in ``out_indices``, in the stock backbone's dtype (fp32 with a
            ``frozen_dtype``).
            Gradient flows to the highway and the output norms alone.
        """
        with self.frozen_forward(images):
            with torch.no_grad():
                tokens, size = self.taps.embed(images)
            offset, outputs = None, []
            for index, stage in enumerate(self.highway):
                with torch.no_grad():
                    tokens, taps = self.taps.run_stage(index, tokens, size)
                delta = stage(taps)
                # At least fp32, also for half-precision deltas: the offset is a sum over the whole depth.
                delta = delta.to(torch.promote_types(delta.dtype, torch.float32))
                offset = delta if offset is None else offset + delta
                if index in self.norms:
                    outputs.append(self._output(index, tokens, offset, size))
                if index + 1 < len(self.highway):
                    tokens, offset, size = self._downsample(index, tokens, offset, size)
        return tuple(outputs)

    def _output(self, index: int, tokens: Tensor, offset: Tensor, size: tuple[int, int]) -> Tensor:
        state = tokens + offset
        # As the stock backbone's: in the dtype that its tokens have, but for a reduced frozen forward.
        normed = self.norms[index](state if self.frozen_dtype else state.to(tokens.dtype))
        return self.restore_dtype(normed.unflatten(1, size).permute(0, 3, 1, 2).contiguous())

    def _downsample(self, index: int, tokens: Tensor, offset: Tensor, size: tuple[int, int]):
        """Both the backbone's tokens and the highway state go through the frozen downsampling."""
        state, _ = self.taps.downsample(index, tokens + offset, size)
        with torch.no_grad():
            tokens, size = self.taps.downsample(index, tokens, size)
        return tokens, state.to(offset.dtype) - tokens, size


def _check_option_names(adapter: dict) -> None:
    unknown = sorted(set(adapter) - set(_ADAPTER_OPTIONS))
    if unknown:
        raise ValueError(f'unknown option {unknown} in adapter={dict(adapter)}; known are {list(_ADAPTER_OPTIONS)}')


def _parse_saved_dtype(saved_dtype: str | None) -> torch.dtype | None:
    dtype = parse_dtype('saved_dtype', saved_dtype, _SAVED_DTYPES)
    if saved_dtype and dtype is None:
        raise ValueError(f'saved_dtype={saved_dtype!r} needs torch 2.1 or newer, this is {torch.__version__}')
    return dtype
