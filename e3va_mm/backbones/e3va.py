"""E³VA as an OpenMMLab backbone (arXiv 2306.09729)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..highway import Recomputed, StageHighway
from ..mixer import build_mixers
from ..tap_record import TapStorage
from ..taps import Size
from .base import FrozenBackbone, parse_dtype

_SAVED_DTYPES = {
    None: None,
    'bfloat16': torch.bfloat16,
    'float8_e4m3fn': getattr(torch, 'float8_e4m3fn', None),
}
_ADAPTER_OPTIONS = ('rank', 'branches', 'hidden_ratio', 'basis', 'mixing')
_MIXER_OPTIONS = ('width', 'kernel_sizes', 'depth')


@MODELS.register_module()
class E3VABackbone(FrozenBackbone):
    """A frozen backbone with a trainable highway beside it; the loss gradient never enters a backbone block.

    With ``x`` the frozen tokens and ``delta_k`` the adapter of tap ``k``, a stage ends in
    ``h = x_end + (h_start - x_start) + sum_k delta_k(tap_k)``; its output is ``norm(h)``, with the backbone's own
    output norm, trained, and the next stage starts from the backbone's own (frozen) downsampling of ``h``.

    Args:
        backbone: config of a stock backbone, its ``init_cfg`` included: mmseg's or mmdet's ``SwinTransformer`` of any
            size, mmseg's ``MixVisionTransformer``, or :class:`TIMMFeatures`.
        adapter: ``rank`` (8), ``branches`` (2) and ``hidden_ratio`` (0.5) of the low-rank adapters; ``basis``
            ('learned') and ``mixing`` (0) are extensions, see :class:`~e3va_mm.highway.StageHighway`. The defaults are
            the paper's: 1,197,312 parameters for Swin-B, 1,792,896 for Swin-L.
        frozen_dtype: 'float16' or 'bfloat16' halves the memory of the frozen weights and speeds their forward up;
            'auto' is 'bfloat16' on a GPU that has it. ``None`` is the paper's method, in the weights' own precision.
        saved_dtype: 'bfloat16' or 'float8_e4m3fn' is what the backward pass keeps of the taps, where it is narrower
            than theirs; the highway's state at the end of a stage is then kept in bfloat16. The forward pass is exact.
            By default, taps of a frozen forward in half precision are kept in that.
        saved_fraction: share of the tokens that the backward pass keeps of the taps (but no fewer than 4096 a batch),
            drawn at random in every step; the gradient stays unbiased and becomes noisier. 1 keeps all.
        recompute_taps: keep no taps and run the frozen stages again in the backward pass: the slow extreme.
        compile_frozen: run the frozen blocks through ``torch.compile``: for training at one fixed image size.
        init: 'zero' starts exactly at the frozen backbone; 'kaiming' draws all factors.
        init_cfg, taps: see :class:`FrozenBackbone`.
        mixer: an extension of the paper: at the end of each stage with taps the highway's state goes through ``depth``
            (1) bottlenecks of ``width`` (32) with depthwise convolutions of ``kernel_sizes`` ((3, 5, 7)), see
            :class:`~e3va_mm.mixer.StateMixer`. ``dict()`` takes the defaults; None has none.

    Raises:
        ValueError: an option is unknown or outside its range.
        KeyError, TypeError: ``backbone`` is of an unknown or unsupported type.
    """

    def __init__(
        self,
        backbone: dict | nn.Module,
        adapter: dict | None = None,
        frozen_dtype: str | None = 'auto',
        saved_dtype: str | None = None,
        saved_fraction: float = 1.0,
        recompute_taps: bool = False,
        compile_frozen: bool = False,
        init: str = 'zero',
        init_cfg: dict | None = None,
        taps: list[dict] | None = None,
        mixer: dict | None = None,
    ) -> None:
        if taps and (recompute_taps or compile_frozen):
            raise ValueError('recompute_taps and compile_frozen need a listed family, not taps from the config')
        super().__init__(backbone, frozen_dtype, init_cfg, compile_frozen, taps)
        _check_option_names('adapter', adapter, _ADAPTER_OPTIONS)
        _check_option_names('mixer', mixer, _MIXER_OPTIONS)
        # Layer scales and norms widen a tap to fp32 behind a matrix that was computed in less.
        kept_dtype = _parse_saved_dtype(saved_dtype) or self.frozen_dtype
        storage = TapStorage(kept_dtype, _parse_fraction(saved_fraction), recompute_taps)
        # The state's rounding reaches the gradients of all earlier stages: 8 bits would be too few.
        self.state_dtype = torch.bfloat16 if saved_dtype else None
        options = dict(adapter or {}, init=init, storage=storage)
        stages = list(zip(self.taps.num_taps, self.taps.embed_dims))
        self.highway = nn.ModuleList(
            StageHighway(num_taps, dims, **options) if num_taps else nn.Identity() for num_taps, dims in stages
        )
        self.mixers = nn.ModuleList(
            build_mixers(dims, **mixer) if num_taps and mixer is not None else nn.ModuleList()
            for num_taps, dims in stages
        )
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
        """The highway's parameters by name (the mixers' included); with the output norms, all that is trained here."""
        parts = {'highway': self.highway, 'mixers': self.mixers}
        return {f'{part}.{name}': value for part, module in parts.items() for name, value in module.named_parameters()}

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
            for index in range(len(self.highway)):
                output, tokens, size, offset = self._advance(index, tokens, size, offset)
                if output is not None:
                    outputs.append(output)
        return tuple(outputs)

    def _advance(
        self, index: int, tokens: Tensor, size: Size, offset: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Size, Tensor | None]:
        """From the start of a stage to its output (or None) and to the start of the next: tokens, size and offset.

        ``offset`` is what the highway carries more than the frozen tokens; None is nothing yet.
        """
        tokens, delta = self._run_stage(index, tokens, size)
        offset, following = _add(offset, delta), None
        if index + 1 < len(self.highway):
            with torch.no_grad():
                following = self.taps.follow(index, tokens, size)
        next_size = following.size if following else None
        results = self._finish_stage(index, self.taps.patches(tokens), offset, size, next_size)
        output = results[0] if index in self.norms else None
        if following is None:
            return output, tokens, size, offset
        if offset is not None:
            offset = results[-1].to(offset.dtype) - following.carried
        return output, following.tokens, next_size, offset

    def _run_stage(self, index: int, tokens: Tensor, size: Size) -> tuple[Tensor, Tensor | None]:
        """The frozen tokens behind a stage's blocks, and the sum of its deltas, if it has taps."""
        stage = self.highway[index]
        if not self.taps.num_taps[index]:
            return self.taps.run_stage(index, tokens, size, lambda tap: None), None
        if self.training and stage.needs_basis():
            self.taps.run_stage(index, tokens, size, stage.fit_basis())
        record = stage.record()
        end = self.taps.run_stage(index, tokens, size, record.add)
        if stage.storage.recompute:
            record.rerun = self._rerun(index, tokens, size)
        delta = stage(record, size)
        # At least fp32, also for half-precision deltas: they are summed over the whole depth.
        return end, delta.to(torch.promote_types(delta.dtype, torch.float32))

    def _rerun(self, index: int, tokens: Tensor, size: Size) -> Callable:
        """Runs a stage once more, outside of this forward pass but under the same autocast."""
        device = tokens.device.type
        dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

        def rerun(visit: Callable[[Tensor], None]) -> None:
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                self.taps.run_stage(index, tokens, size, visit)

        return rerun

    def _finish_stage(
        self, index: int, tokens: Tensor, offset: Tensor | None, size: Size, next_size: Size | None
    ) -> tuple[Tensor, ...]:
        """The stage's output (if it has one) and the highway's state at the start of the next (if there is one)."""
        norm, mixers, dtype = self.norms.get(index), self.mixers[index], tokens.dtype

        # Lives as long as the graph: a tensor that it named would be kept as well.
        def finish(state: Tensor) -> tuple[Tensor, ...]:
            for mixer in mixers:
                state = mixer(state, size)
            outputs = () if norm is None else (self._output(norm, state, dtype, size),)
            return (*outputs, self.taps.carry(index, state, size, next_size)) if next_size else outputs

        # Mixers, output norm and downsampling are cheap and start from the same state, so one copy of it serves all.
        parameters = (*mixers.parameters(), *(() if norm is None else norm.parameters()))
        return Recomputed.apply(finish, self.state_dtype, _add(tokens, offset), *parameters)

    def _output(self, norm: nn.Module, state: Tensor, dtype: torch.dtype, size: Size) -> Tensor:
        # As the stock backbone's: in the dtype that its tokens have, but for a reduced frozen forward.
        normed = norm(state if self.frozen_dtype else state.to(dtype))
        return self.restore_dtype(normed.unflatten(1, size).permute(0, 3, 1, 2).contiguous())


def _add(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


def _check_option_names(name: str, given: dict | None, known: tuple[str, ...]) -> None:
    if not isinstance(given, (dict, type(None))):
        raise ValueError(f'{name} must be a dict with options of {list(known)}, or None, got {given!r}')
    unknown = sorted(set(given or {}) - set(known))
    if unknown:
        raise ValueError(f'unknown option {unknown} in {name}={dict(given)}; known are {list(known)}')


def _parse_saved_dtype(saved_dtype: str | None) -> torch.dtype | None:
    dtype = parse_dtype('saved_dtype', saved_dtype, _SAVED_DTYPES)
    if saved_dtype and dtype is None:
        raise ValueError(f'saved_dtype={saved_dtype!r} needs torch 2.1 or newer, this is {torch.__version__}')
    return dtype


def _parse_fraction(fraction: float) -> float:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ValueError(f'saved_fraction must be a number above 0 and at most 1, got {fraction!r}')
    return float(fraction)
