"""E³VA as an OpenMMLab backbone (arXiv 2306.09729)."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

from ..checks import check_count
from ..highway import Recomputed, StageHighway
from ..mixer import MixerWeights, build_mixers, mix, mixer_weights
from ..tap_record import TapStorage
from ..taps import Size, StageStart
from .base import FrozenBackbone, parse_dtype

_SAVED_DTYPES = {
    None: None,
    'bfloat16': torch.bfloat16,
    'float8_e4m3fn': torch.float8_e4m3fn,
}
_ADAPTER_OPTIONS = ('rank', 'branches', 'hidden_ratio', 'basis', 'mixing')
_MIXER_OPTIONS = ('width', 'kernel_sizes', 'depth', 'every')


class Segment(NamedTuple):
    """Blocks of a stage whose deltas are evaluated together, and behind which the state is mixed.

    ``in_graph``: the state itself runs through the blocks, which have no adapters.
    """

    stage: int
    blocks: slice
    num_taps: int
    ends_stage: bool
    in_graph: bool


@MODELS.register_module()
class E3VABackbone(FrozenBackbone):
    """A frozen backbone with a trainable highway beside it; the loss gradient enters no backbone block (by default).

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
            :class:`~e3va_mm.mixer.StateMixer`; with ``every`` (None) also within a stage, behind that many blocks.
            ``dict()`` takes the defaults; None has none.
        feedback: an extension of the paper: where the state is mixed (without mixers, at the end of each stage), the
            frozen blocks behind go on from the highway's state, so that they read adapted tokens. The gradient still
            leaves the blocks out: it takes what they add to be constant. The frozen forward then depends on the
            adapters, and can not be shared between tasks. It has no parameters, so that a checkpoint does not tell
            whether it was trained with it: test with the option that you train with.
        graph_stages: an extension of the paper: in that many of the last stages the highway's state itself runs through
            the frozen blocks, with mixers behind each block in place of the adapters. The gradient runs through these
            blocks, which the backward pass computes again, one at a time. Needs ``mixer``; for Swin and MiT, and timm's
            Swin, ConvNeXt, PVT and SAM's ViT: no class tokens, and no block that changes the size of its input.

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
        feedback: bool = False,
        graph_stages: int = 0,
    ) -> None:
        _check_option_names('adapter', adapter, _ADAPTER_OPTIONS)
        _check_option_names('mixer', mixer, _MIXER_OPTIONS)
        mixer, every = _split_mixer(mixer)
        if taps and (recompute_taps or compile_frozen or feedback or every):
            options = 'recompute_taps, compile_frozen, feedback and mixer.every'
            raise ValueError(f'{options} need a listed family, not taps from the config')
        super().__init__(backbone, frozen_dtype, init_cfg, compile_frozen, taps)
        # Layer scales and norms widen a tap to fp32 behind a matrix that was computed in less.
        kept_dtype = parse_dtype('saved_dtype', saved_dtype, _SAVED_DTYPES) or self.frozen_dtype
        storage = TapStorage(kept_dtype, _parse_fraction(saved_fraction), recompute_taps)
        # The state's rounding reaches the gradients of all earlier stages: 8 bits would be too few.
        self.state_dtype = torch.bfloat16 if saved_dtype else None
        self._next_sizes: dict[tuple[int, Size], Size] = {}
        options = dict(adapter or {}, init=init, storage=storage)
        self.feedback = feedback
        self._check_graph_stages(graph_stages, mixer, compile_frozen)
        self.segments = _segments(self.taps.block_taps, every, graph_stages)
        self.highway, self.mixers = nn.ModuleList(), nn.ModuleList()
        for segment in self.segments:
            dims, has_taps = self.taps.embed_dims[segment.stage], segment.num_taps > 0
            has_adapters = has_taps and not segment.in_graph
            self.highway.append(StageHighway(segment.num_taps, dims, **options) if has_adapters else nn.Identity())
            self.mixers.append(build_mixers(dims, **mixer) if has_taps and mixer is not None else nn.ModuleList())
        norms = (self.backbone.get_submodule(name) for name in self.taps.norm_names)
        self.norms = dict(zip(self.taps.out_indices, norms))
        self.freeze_base(
            trained={
                f'{name}.{parameter}'
                for name in self.taps.norm_names
                for parameter, _ in self.backbone.get_submodule(name).named_parameters()
            }
        )

    def _check_graph_stages(self, number: int, mixer: dict | None, compile_frozen: bool) -> None:
        if isinstance(number, bool) or not isinstance(number, int) or not 0 <= number < self.taps.num_stages:
            raise ValueError(f'graph_stages must be an integer of 0 to {self.taps.num_stages - 1}, got {number!r}')
        if number and (mixer is None or compile_frozen):
            raise ValueError(f'graph_stages={number} needs a mixer, such as mixer=dict(), and compile_frozen=False')
        if number and not self.taps.state_enters_blocks:
            name = type(self.backbone).__name__
            raise ValueError(f"graph_stages={number}: the blocks of this {name} can not run on the highway's state")

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
            Gradient flows to highway, mixers and output norms alone, with ``graph_stages`` through the last blocks.
        """
        with self.frozen_forward(images):
            with torch.no_grad():
                tokens, size = self.taps.embed(images)
            offset, outputs = None, []
            for index, mixers in enumerate(self._mixer_weights()):
                output, tokens, size, offset = self._advance(index, mixers, tokens, size, offset)
                if output is not None:
                    outputs.append(output)
        return tuple(outputs)

    def _mixer_weights(self) -> list[list[MixerWeights]]:
        """Those of each segment's mixers."""
        weights = iter(mixer_weights([mixer for mixers in self.mixers for mixer in mixers]))
        return [[next(weights) for _ in mixers] for mixers in self.mixers]

    def _advance(
        self, index: int, mixers: list[MixerWeights], tokens: Tensor, size: Size, offset: Tensor | None
    ) -> tuple[Tensor | None, Tensor, Size, Tensor | None]:
        """From the start of a segment to its output (or None) and to the start of the next: tokens, size and offset.

        ``offset`` is what the highway carries more than the frozen tokens; None is nothing yet. With feedback, and from
        within the graph, its value is zero at the start of a segment, and the gradient through it is that of the state.
        """
        segment, is_last = self.segments[index], index + 1 == len(self.segments)
        if not segment.in_graph:
            tokens, delta = self._run_segment(index, tokens, size)
            offset = _add(offset, delta)
        next_size = None if is_last else self._next_size(segment, tokens, size)
        patches = self.taps.patches(tokens)
        output, carried, mixed = self._finish_segment(index, mixers, patches, offset, size, next_size)
        if is_last:
            return output, tokens, size, offset
        is_adapted = offset is not None or segment.in_graph
        if mixed is not None and is_adapted:
            tokens = self.taps.with_patches(tokens, mixed)
        following = self._follow(segment, tokens, size)
        if is_adapted:
            offset = carried.to(torch.promote_types(carried.dtype, torch.float32)) - following.carried
        return output, following.tokens, next_size, offset

    @torch.no_grad()
    def _follow(self, segment: Segment, tokens: Tensor, size: Size) -> StageStart:
        """The frozen tokens from the end of a segment to the start of the next."""
        if segment.ends_stage:
            return self.taps.follow(segment.stage, tokens, size)
        return StageStart(tokens, size, self.taps.patches(tokens))

    def _next_size(self, segment: Segment, tokens: Tensor, size: Size) -> Size:
        """The size at the start of the next segment; each is found out once."""
        if not segment.ends_stage:
            return size
        key = segment.stage, tuple(size)
        if key not in self._next_sizes:
            self._next_sizes[key] = self._follow(segment, tokens, size).size
        return self._next_sizes[key]

    def _run_segment(self, index: int, tokens: Tensor, size: Size) -> tuple[Tensor, Tensor | None]:
        """The frozen tokens behind a segment's blocks, and the sum of its deltas, if it has taps."""
        highway, segment = self.highway[index], self.segments[index]
        run = partial(self.taps.run_stage, segment.stage, tokens, size, blocks=segment.blocks)
        if not segment.num_taps:
            return run(visit=lambda tap: None), None
        if self.training and highway.needs_basis():
            run(visit=highway.fit_basis())
        record = highway.record()
        end = run(visit=record.add)
        if highway.storage.recompute:
            record.rerun = _under_this_autocast(run, tokens.device.type)
        delta = highway(record, size)
        # At least fp32, also for half-precision deltas: they are summed over the whole depth.
        return end, delta.to(torch.promote_types(delta.dtype, torch.float32))

    def _finish_segment(
        self,
        index: int,
        mixers: list[MixerWeights],
        tokens: Tensor,
        offset: Tensor | None,
        size: Size,
        next_size: Size | None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The segment's output, the state at the start of the next one, and the mixed state if blocks go on from it."""
        segment, dtype = self.segments[index], tokens.dtype
        norm = self.norms.get(segment.stage) if segment.ends_stage else None
        goes_on = self.feedback or segment.in_graph

        # Lives as long as the graph: a tensor that it named would be kept as well.
        def finish(state: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
            if segment.in_graph:
                state = self.taps.run_blocks(segment.stage, state, size, segment.blocks)
            for weights in mixers:
                state = mix(state, size, weights)
            output = None if norm is None else self._output(norm, state, dtype, size)
            carried = state if next_size else None
            if next_size and segment.ends_stage:
                carried = self.taps.carry(segment.stage, state, size, next_size)
            return output, carried, state.detach() if next_size and goes_on else None

        # Mixers, output norm and downsampling are cheap and start from the same state, so one copy of it serves all.
        parameters = (*itertools.chain(*mixers), *(() if norm is None else norm.parameters()))
        output, carried, mixed = Recomputed.apply(finish, self.state_dtype, _add(tokens, offset), *parameters)
        return output, carried, None if mixed is None else mixed.detach()

    def _output(self, norm: nn.Module, state: Tensor, dtype: torch.dtype, size: Size) -> Tensor:
        # As the stock backbone's: in the dtype that its tokens have, but for a reduced frozen forward.
        normed = norm(state if self.frozen_dtype else state.to(dtype))
        return self.restore_dtype(normed.unflatten(1, size).permute(0, 3, 1, 2).contiguous())


def _segments(block_taps: list[list[int]], every: int | None, graph_stages: int) -> list[Segment]:
    """The stages, cut behind each ``every`` blocks; those in the graph behind each block."""
    segments = []
    for stage, counts in enumerate(block_taps):
        in_graph = stage >= len(block_taps) - graph_stages
        length = 1 if in_graph else every or max(1, len(counts))
        for start in range(0, max(1, len(counts)), length):
            stop = start + length
            num_taps = sum(counts[start:stop])
            segments.append(Segment(stage, slice(start, stop), num_taps, stop >= len(counts), in_graph))
    return segments


def _split_mixer(mixer: dict | None) -> tuple[dict | None, int | None]:
    """The options of a mixer, and the number of blocks between mixers."""
    every = (mixer or {}).get('every')
    if every is not None:
        check_count('mixer.every', every)
    return None if mixer is None else {name: value for name, value in mixer.items() if name != 'every'}, every


def _under_this_autocast(run: Callable, device: str) -> Callable[[Callable[[Tensor], None]], None]:
    """``run(visit=...)`` outside of this forward pass but under the same autocast."""
    dtype, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)

    def rerun(visit: Callable[[Tensor], None]) -> None:
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            run(visit=visit)

    return rerun


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


def _parse_fraction(fraction: float) -> float:
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ValueError(f'saved_fraction must be a number above 0 and at most 1, got {fraction!r}')
    return float(fraction)
