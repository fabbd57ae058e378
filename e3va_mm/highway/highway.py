"""The highway of the paper, from stage to stage: taps and the ends of stages in, feature maps out.

With ``x_s`` the frozen tokens at the end of stage ``s`` and ``carry_s`` the way to the next stage::

    h_s   = x_s + offset_s + sum_k delta_k(tap_k)              offset_0 = 0
    map_s = norm_s(mix_s(h_s))
    offset_{s+1} = carry_s(mix_s(h_s)) - carry_s(x_s)

which is the paper's recursion (arXiv 2306.09729), since a stage ends at its start plus its taps. Where ``carry_s`` is a
pooling, which is linear, it carries the difference ``mix_s(h_s) - x_s`` alone. ``mix`` is the identity without mixers.
In the last stages the state may run through the backbone's blocks itself, an extension::

    h <- mix_b(block_b(h)) for each block b

The frozen pass tells what it comes by, in its order: a :class:`HighwayPass` hears it, and works at once; several may
hear one, see :mod:`.several`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .mixer import MixerWeights, StateMixer, mix, mixer_weights
from .recomputed import recomputed
from .stage_adapters import StageAdapters
from .tap_record import TapRecord

Size = tuple[int, int]


class HighwayStage(NamedTuple):
    """A stage of the backbone, and what the highway has in it."""

    block_taps: list[int]  # the number of taps in each of its blocks
    embed_dims: int
    norm: nn.Module | None  # over the last dimension; none where the stage has no output
    tells_start: bool  # whether the frozen pass is heard at the start of the next stage
    tap_dims: int | None = None  # channels of its taps; None: embed_dims
    adapters: StageAdapters | None = None  # none where the stage has no taps, or is in the graph
    mixers: tuple[StateMixer, ...] = ()  # at most one; of a stage in the graph one behind each block
    num_graph_blocks: int = 0  # blocks that the state itself runs through


class Highway(nn.Module):
    """The stages of the highway and the route between them.

    ``adapters`` and ``mixers`` have an entry a stage, one a block for stages in the graph; some are empty.

    Args:
        stages: of the backbone, up to the last one that has an output.
        route: how the state crosses from stage to stage (``carry``, or ``pool`` where it ``pools``) and through blocks
            (``run_block``): a :class:`~e3va_mm.families.base.Family`.
        adapter: options of :class:`~.stage_adapters.StageAdapters`.
        mixer: options of :class:`~.mixer.StateMixer`, or None for none.
        graph_stages: so many of the last stages run on the state, with mixers in place of adapters.
        state_dtype: in which the states at the ends of stages are kept for the backward pass; None: as they are.
        precise_maps: whether norms read the state in at least fp32, or in the dtype of the frozen tokens, as the
            backbone's own do.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        stages: list[HighwayStage],
        route,
        adapter: dict,
        mixer: dict | None = None,
        graph_stages: int = 0,
        state_dtype: torch.dtype | None = None,
        precise_maps: bool = False,
    ) -> None:
        super().__init__()
        self.route, self.state_dtype, self.precise_maps = route, state_dtype, precise_maps
        self.num_heard = len(stages) - graph_stages
        self.adapters, self.mixers, self.stages = nn.ModuleList(), nn.ModuleList(), []
        for index, stage in enumerate(stages):
            in_graph, first = index >= self.num_heard, len(self.adapters)
            for num_taps in stage.block_taps if in_graph else [sum(stage.block_taps)]:
                has_adapters, has_mixer = num_taps and not in_graph, num_taps and mixer is not None
                options = dict(adapter, tap_dims=stage.tap_dims)
                adapters = StageAdapters(num_taps, stage.embed_dims, **options) if has_adapters else nn.Identity()
                self.adapters.append(adapters)
                self.mixers.append(nn.ModuleList([StateMixer(stage.embed_dims, **mixer)] if has_mixer else []))
            own = dict(
                adapters=adapters if isinstance(adapters, StageAdapters) else None,
                mixers=tuple(each for entry in self.mixers[first:] for each in entry),
                num_graph_blocks=len(self.adapters) - first if in_graph else 0,
            )
            self.stages.append(stage._replace(**own))

    def mixer_weights(self) -> list[list[MixerWeights]]:
        """Those of each stage's mixers."""
        weights = iter(mixer_weights([mixer for stage in self.stages for mixer in stage.mixers]))
        return [[next(weights) for _ in stage.mixers] for stage in self.stages]


class HighwayPass:
    """Hears one frozen pass (without gradient) and goes along it; with gradient if that is enabled at its start."""

    def __init__(self, highway: Highway) -> None:
        self.highway, self.route = highway, highway.route
        # The frozen pass runs under no_grad, and its hooks with it.
        self.with_grad = torch.is_grad_enabled()
        self.mixers = highway.mixer_weights()
        self.records: dict[int, TapRecord] = {}
        # The state at the start of a stage, and what it has more than the frozen tokens there.
        self.state: Tensor | None = None
        self.offset: Tensor | None = None
        self.size: Size | None = None
        # What the state has more at the end of a stage, until the size at the start of the next is known.
        self.difference: tuple[int, Tensor, Size] | None = None
        self.map_dtype: torch.dtype | None = None
        self.maps: list[Tensor] = []

    def tap(self, stage: int, tokens: Tensor, size: Size | None) -> None:
        """Hears the next tap of a stage, (B, L, C) of ``size``, where the family can tell that."""
        if stage not in self.records:
            self._open_record(stage, size)
        self.records[stage].add(tokens)

    def take_record(self, stage: int, fill: Callable[[TapRecord], None], size: Size | None) -> None:
        """In place of all taps of a stage: what fills a record of them."""
        self._open_record(stage, size)
        fill(self.records[stage])

    def _open_record(self, stage: int, size: Size | None) -> None:
        with torch.set_grad_enabled(self.with_grad):
            self._pool(size)
            self.records[stage] = self.highway.stages[stage].adapters.record()

    def level(self, stage: int, tokens: Tensor, size: Size) -> None:
        """Hears the tokens (B, H * W, C) at the end of a stage, with their height and width."""
        with torch.set_grad_enabled(self.with_grad):
            self._pool(size)
            self._leave_stage(stage, tokens, size)

    def start(self, stage: int, tokens: Tensor) -> None:
        """Hears the frozen tokens (B, L, C) at the start of the stage behind this one, where the family can tell."""
        if self.state is not None and stage + 1 < self.highway.num_heard:
            with torch.set_grad_enabled(self.with_grad):
                self.offset, self.state = self.state - tokens, None

    def finish(self) -> tuple[Tensor, ...]:
        """Goes on through the stages in the graph.

        Returns:
            (B, C_s, H_s, W_s) of each stage with an output. Gradient flows to adapters, mixers and norms, and from
            stages in the graph through the backbone's blocks.
        """
        for index in range(self.highway.num_heard, len(self.highway.stages)):
            for number in range(self.highway.stages[index].num_graph_blocks):
                self.state, self.size = self._step(index, number, self.state, self.size)
        return tuple(self.maps)

    def _pool(self, next_size: Size | None) -> None:
        """The difference that waits at the end of a stage, to the next one's start, once the size there is known."""
        if self.difference is not None and next_size is not None:
            (index, difference, size), self.difference = self.difference, None
            self.offset = self.route.pool(index, difference, size, next_size)

    def _leave_stage(self, index: int, tokens: Tensor, size: Size) -> None:
        """From the taps of a stage and its end to its map, and to the start of the next where that is known."""
        stage = self.highway.stages[index]
        self.map_dtype = _at_least_fp32(tokens.dtype) if self.highway.precise_maps else tokens.dtype
        difference, self.offset = self.offset, None
        if stage.adapters is not None:
            # At least fp32, also for half-precision deltas: they are summed over the whole depth.
            delta = _precise(stage.adapters(self._record(index, tokens)))
            difference = delta if difference is None else difference + delta
        # Copied at the least: in-place activations come next in many networks.
        state = tokens.clone() if difference is None else tokens + difference
        self.state, self.size = self._step(index, 0, state, size)
        if self.route.pools and self.state is not None:
            difference = self.state - tokens if stage.mixers else difference
            self.difference = None if difference is None else (index, difference, size)
            self.state = None
        elif not stage.tells_start and index + 1 < self.highway.num_heard and not self.route.pools:
            with torch.no_grad():
                start, _ = self.route.carry(index, tokens, size)
            self.start(index, start)

    def _record(self, index: int, tokens: Tensor) -> TapRecord:
        record = self.records.pop(index, None)
        num_taps = len(self.highway.stages[index].adapters.down_in)
        if record is None or record.num_taps != num_taps or record.shape[:-1] != tokens.shape[:-1]:
            heard = 'none' if record is None else f'{record.num_taps} of shape {tuple(record.shape)}'
            raise ValueError(f'stage {index} has {num_taps} taps of shape {tuple(tokens.shape)}, but heard {heard}')
        return record

    def _step(self, index: int, number: int, state: Tensor, size: Size) -> tuple[Tensor | None, Size | None]:
        """Through a block in the graph, if there is one, and a mixer; at the end of a stage its map comes out.

        Returns:
            The state behind it, at the start of the next stage (None behind the last) but for one that is pooled, and
            its size.
        """
        highway, stage = self.highway, self.highway.stages[index]
        mixer = self.mixers[index][number] if stage.mixers else None
        ends_stage = number + 1 >= stage.num_graph_blocks
        norm = stage.norm if ends_stage else None
        is_last = ends_stage and index + 1 == len(highway.stages)
        route, dtype, sizes = self.route, self.map_dtype, [size]

        # Lives as long as the graph: a tensor that it named would be kept as well.
        def go(state: Tensor) -> tuple[Tensor | None, Tensor | None]:
            if stage.num_graph_blocks:
                state = route.run_block(index, number, state, size)
            if mixer is not None:
                state = mix(state, size, mixer)
            output = None if norm is None else normed_map(norm, state.to(dtype), size)
            if is_last:
                return output, None
            if ends_stage and not route.pools:
                state, sizes[0] = route.carry(index, state, size)
            return output, _precise(state)

        parameters = (*(mixer or ()), *(() if norm is None else norm.parameters()))
        if route.pools and not parameters:
            output, behind = go(state)  # Keeps nothing.
        else:
            # All of it is cheap, or in the graph, and starts from the same state: one copy of that serves all.
            output, behind = recomputed(go, highway.state_dtype, state, *parameters)
        if output is not None:
            self.maps.append(output)
        return behind, sizes[0]


def normed_map(norm: nn.Module, tokens: Tensor, size: Size) -> Tensor:
    """Tokens (B, H * W, C) through a norm over C -> (B, C, H, W)."""
    return norm(tokens).unflatten(1, size).permute(0, 3, 1, 2).contiguous()


def _precise(tensor: Tensor) -> Tensor:
    return tensor.to(_at_least_fp32(tensor.dtype))


def _at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
