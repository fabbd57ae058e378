"""Taps that the config names, for backbones whose family is not known."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .stages import ChannelAffine, Size, from_nchw, pool_and_pad
from .taps import WHOLE, StageStart


class Recorded(NamedTuple):
    """One frozen forward pass: tokens (B, L, C) with their sizes."""

    taps: list[list[Tensor]]  # of each stage
    ends: list[tuple[Tensor, Size]]  # of each stage
    index: int = 0  # the current stage


class CustomTaps:
    """Taps of any convolutional or token-map backbone, by module paths; the interface of :class:`~.taps.SwinTaps`.

    The frozen backbone runs once, as a whole, and everything named is recorded by hooks: taps of all stages exist at a
    time, which costs more memory than the known families. From stage to stage the highway's state is average-pooled to
    the next size, and channels are dropped or added with zeros. Output norms are per-channel affine maps that start as
    the identity.

    Args:
        backbone: the stock module; its outputs are not used, only those of the modules named.
        stages: for each stage ``dict(taps=[...], end=..., dims=..., output=True)``: paths of the modules whose outputs
            are added to the residual stream (all of the size of ``end``'s output), of the module that ends the stage,
            its channels, and whether the highway has an output there. Outputs are (B, C, H, W).

    Raises:
        ValueError: a stage has no or unknown keys, or a path names no module.
    """

    state_enters_blocks = False

    def __init__(self, backbone: nn.Module, stages: list[dict]) -> None:
        self.backbone = backbone
        modules = dict(backbone.named_modules())
        for number, stage in enumerate(stages):
            _check_stage(f'taps[{number}]', stage, modules)
        self.branches = [[modules[path] for path in stage['taps']] for stage in stages]
        self.end_modules = [modules[stage['end']] for stage in stages]
        self.out_indices = tuple(index for index, stage in enumerate(stages) if stage.get('output', True))
        self.num_stages = max(self.out_indices, default=-1) + 1
        if not self.num_stages:
            raise ValueError(f'taps={stages!r} has no stage with an output')
        self.embed_dims = [stage['dims'] for stage in stages[: self.num_stages]]
        # Blocks are not known: a stage counts as one.
        self.block_taps = [[len(branches)] for branches in self.branches[: self.num_stages]]
        self.norm_names = [f'e3va_norm{index}' for index in self.out_indices]
        for name, index in zip(self.norm_names, self.out_indices):
            backbone.add_module(name, ChannelAffine(self.embed_dims[index]))

    def remember(self) -> None:
        pass

    def embed(self, images: Tensor) -> tuple[Recorded, Size]:
        taps: list[list[Tensor]] = [[] for _ in range(self.num_stages)]
        ends: list = [None] * self.num_stages
        with contextlib.ExitStack() as hooks, torch.no_grad():
            for index in range(self.num_stages):
                for module in self.branches[index]:
                    hooks.callback(module.register_forward_hook(_append_to(taps[index])).remove)
                hooks.callback(self.end_modules[index].register_forward_hook(_put_into(ends, index)).remove)
            self.backbone(images)
        self._check(taps, ends)
        return Recorded(taps, ends), ends[0][1]

    def _check(self, taps: list[list[Tensor]], ends: list) -> None:
        for index, (dims, (number,)) in enumerate(zip(self.embed_dims, self.block_taps)):
            shapes = [tuple(tap.shape) for tap in taps[index]]
            end = tuple(ends[index][0].shape) if ends[index] else None
            if end is None or end[-1] != dims or shapes != [end] * number:
                raise ValueError(
                    f'taps[{index}] should give {number} taps and an end of {dims} channels and one size; as tokens '
                    f'(B, H * W, C), the taps were {shapes} and the end {end}'
                )

    def run_stage(
        self, index: int, recorded: Recorded, size: Size, visit: Callable[[Tensor], None], blocks: slice = WHOLE
    ) -> Recorded:
        for tap in recorded.taps[index]:
            visit(tap)
        return recorded._replace(index=index)

    def patches(self, recorded: Recorded) -> Tensor:
        return recorded.ends[recorded.index][0]

    def follow(self, index: int, recorded: Recorded, size: Size) -> StageStart:
        next_size = recorded.ends[index + 1][1]
        return StageStart(recorded, next_size, self.carry(index, self.patches(recorded), size, next_size))

    def carry(self, index: int, state: Tensor, size: Size, next_size: Size) -> Tensor:
        return pool_and_pad(state, size, next_size, self.embed_dims[index + 1])

    def blocks(self):
        raise ValueError('this method needs a known family of backbones, not taps from the config')


def _check_stage(where: str, stage: dict, modules: dict[str, nn.Module]) -> None:
    if not {'taps', 'end', 'dims'} <= set(stage) <= {'taps', 'end', 'dims', 'output'}:
        raise ValueError(f'{where} must have the keys taps, end and dims, and may have output; got {sorted(stage)}')
    unknown = [path for path in [*stage['taps'], stage['end']] if path not in modules]
    if unknown:
        raise ValueError(f'{where} names {unknown}, and the backbone has no such modules')


def _append_to(taps: list[Tensor]):
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        # Cloned, because in-place activations come next in many networks.
        taps.append(from_nchw(output.clone())[0])

    return hook


def _put_into(ends: list, index: int):
    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        ends[index] = from_nchw(output.clone())

    return hook
