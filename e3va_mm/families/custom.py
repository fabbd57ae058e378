"""Taps that the config names, for backbones whose family is not known."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_count, check_names, check_switch
from .base import Block, Family, Size, Stage, pool_and_pad


class ChannelAffine(nn.Module):
    """``weight * x + bias`` over the last dimension; the identity at the start."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dims)), nn.Parameter(torch.zeros(dims))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.weight + self.bias


class CustomFamily(Family):
    """Any backbone whose modules put out maps (B, C, H, W), by their paths.

    From stage to stage the highway's state is average-pooled to the next size, and channels are dropped or added with
    zeros. Output norms are per-channel affine maps that start as the identity.

    Args:
        backbone: the stock module.
        taps: for each stage ``dict(taps=[...], end=..., dims=..., output=True)``: paths of the modules whose outputs
            are added to the residual stream (all of the size of ``end``'s output), of the module that ends the stage,
            its channels, and whether the highway has an output there. The outputs are the maps that the backbone
            returns, in their order.

    Raises:
        ValueError: a stage has no or unknown keys, or a path names no module.
    """

    layout = 'NCHW'
    waits = True

    def __init__(self, backbone: nn.Module, taps: list[dict]) -> None:
        if not isinstance(taps, (list, tuple)):
            raise ValueError(f'taps must be a list with a dict a stage, got {taps!r}')
        modules = dict(backbone.named_modules())
        for number, stage in enumerate(taps):
            _check_stage(f'taps[{number}]', stage, modules)
        num_stages = max((index + 1 for index, stage in enumerate(taps) if stage.get('output', True)), default=0)
        if not num_stages:
            raise ValueError(f'taps={taps!r} has no stage with an output')
        stages = []
        for index, stage in enumerate(taps[:num_stages]):
            norm = f'e3va_norm{index}' if stage.get('output', True) else None
            if norm:
                backbone.add_module(norm, ChannelAffine(stage['dims']))
            # Blocks are not known: a stage counts as one.
            stages.append(Stage([Block(stage['end'], tuple(stage['taps']))], stage['end'], stage['dims'], norm))
        super().__init__(backbone, stages)

    def tap(self, stage: int, output: Tensor, grid: Size | None) -> tuple[Tensor, Size | None]:
        self._check(f'a module of taps[{stage}].taps', stage, output)
        return super().tap(stage, output, grid)

    def level(self, stage: int, args: tuple, output: Tensor, grid: Size | None) -> tuple[Tensor, Size]:
        self._check(f'taps[{stage}].end={self.stages[stage].end!r}', stage, output)
        return super().level(stage, args, output, grid)

    def _check(self, what: str, stage: int, output: Tensor) -> None:
        dims = self.stages[stage].embed_dims
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[1] != dims:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f'{what} should put out (B, {dims}, H, W) by taps[{stage}].dims, and put out {found}')

    def carry(self, stage: int, tokens: Tensor, size: Size, next_size: Size | None) -> tuple[Tensor, Size]:
        return pool_and_pad(tokens, size, next_size, self.stages[stage + 1].embed_dims), next_size

    def published_norm(self, stage: Stage) -> nn.Module:
        return ChannelAffine(stage.embed_dims).to(self.module(stage.norm).weight)


def _check_stage(where: str, stage: dict, modules: dict[str, nn.Module]) -> None:
    if not isinstance(stage, dict) or not {'taps', 'end', 'dims'} <= set(stage) <= {'taps', 'end', 'dims', 'output'}:
        raise ValueError(f'{where} must be a dict with the keys taps, end and dims, and may have output; got {stage!r}')
    check_names(f'{where}.taps', stage['taps'])
    if not isinstance(stage['end'], str):
        raise ValueError(f'{where}.end must be the path of a module, got {stage["end"]!r}')
    check_count(f'{where}.dims', stage['dims'])
    check_switch(f'{where}.output', stage.get('output', True))
    unknown = [path for path in [*stage['taps'], stage['end']] if path not in modules]
    if unknown:
        raise ValueError(f'{where} names {unknown}, and the backbone has no such modules')
