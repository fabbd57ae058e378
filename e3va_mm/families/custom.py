"""Any backbone that returns maps: levels are its maps, or ends that are named; taps are outputs of its modules."""

from __future__ import annotations

from torch import Tensor, nn

from ..checks import check_count, check_names, check_switch
from .base import Block, PoolingFamily, Size, Stage

_KEYS = {'taps', 'end', 'dims', 'output', 'prefix'}


class CustomFamily(PoolingFamily):
    """A backbone whose stages are named by modules' paths.

    Args:
        backbone: the stock module.
        taps: for each stage ``dict(taps=[...], dims=..., end=..., output=True, prefix=0)``: paths of the modules whose
            outputs the adapters read, maps (B, C, H, W) or (B, H, W, C) or tokens (B, L, C) of the stage's size; the
            channels C; the path of the module that ends the stage, which puts out a map (B, C, H, W) (left out: the
            stage ends in the map that the backbone returns); whether the highway has an output there; the number of
            tokens ahead of those of patches. The outputs are the maps that the backbone returns, in their order.

    Raises:
        ValueError: a stage has no or unknown keys, or a path names no module.
    """

    def __init__(self, backbone: nn.Module, taps: list[dict]) -> None:
        if not isinstance(taps, (list, tuple)):
            raise ValueError(f'taps must be a list with a dict a stage, got {taps!r}')
        modules = dict(backbone.named_modules())
        for number, stage in enumerate(taps):
            _check_stage(f'taps[{number}]', stage, modules)
        num_stages = max((index + 1 for index, stage in enumerate(taps) if stage.get('output', True)), default=0)
        if not num_stages:
            raise ValueError(f'taps={taps!r} has no stage with an output')
        _check_order(taps)
        self.prefixes = [stage.get('prefix', 0) for stage in taps]
        stages = []
        for index, stage in enumerate(taps[:num_stages]):
            norm = self.add_output(backbone, index) if stage.get('output', True) else None
            blocks = [Block(path, (path,)) for path in stage['taps']]
            stages.append(Stage(blocks, stage.get('end'), stage['dims'], norm))
        super().__init__(backbone, stages)

    def tap(self, stage: int, output: Tensor | tuple, grid: Size | None) -> tuple[Tensor, Size | None]:
        output = output[0] if isinstance(output, (tuple, list)) and output else output
        dims = self.stages[stage].embed_dims
        if isinstance(output, Tensor) and output.ndim == 3 and output.shape[2] == dims:
            return output[:, self.prefixes[stage] :], None
        if isinstance(output, Tensor) and output.ndim == 4 and dims == output.shape[3] != output.shape[1]:
            return output.flatten(1, 2), tuple(output.shape[1:3])
        self._check(f'a module of taps[{stage}].taps', stage, output)
        return self._from_map(output)

    def level(self, stage: int, args: tuple, output: Tensor, grid: Size | None) -> tuple[Tensor, Size]:
        self._check(f'taps[{stage}].end={self.stages[stage].end!r}', stage, output)
        return self._from_map(output)

    def _check(self, what: str, stage: int, output: Tensor) -> None:
        dims = self.stages[stage].embed_dims
        if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[1] != dims:
            found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise ValueError(f'{what} should put out (B, {dims}, H, W) by taps[{stage}].dims, and put out {found}')


def _check_order(taps: list[dict]) -> None:
    """What the backbone returns is heard behind all of its modules."""
    returned = next((index for index, stage in enumerate(taps) if stage.get('end') is None), len(taps))
    for index, stage in enumerate(taps[returned:], returned):
        if stage.get('end') is not None:
            raise ValueError(
                f'taps[{index}].end={stage["end"]!r} comes before the end of taps[{returned}], which is a map that the '
                f'backbone returns: name taps[{returned}].end too, or leave out taps[{index}]'
            )


def _check_stage(where: str, stage: dict, modules: dict[str, nn.Module]) -> None:
    if not isinstance(stage, dict) or not {'taps', 'dims'} <= set(stage) <= _KEYS:
        raise ValueError(
            f'{where} must be a dict with the keys taps and dims, and may have end, output and prefix; got {stage!r}'
        )
    if stage['taps'] != []:
        check_names(f'{where}.taps', stage['taps'])
    if not isinstance(stage.get('end', ''), (str, type(None))):
        raise ValueError(f'{where}.end must be the path of a module, got {stage["end"]!r}')
    check_count(f'{where}.dims', stage['dims'])
    check_switch(f'{where}.output', stage.get('output', True))
    if stage.get('prefix', 0) != 0:
        check_count(f'{where}.prefix', stage['prefix'])
    if stage.get('end') is None and not stage.get('output', True):
        raise ValueError(f'{where} has no output, and so must name its end')
    unknown = [path for path in [*stage['taps'], *filter(None, [stage.get('end')])] if path not in modules]
    if unknown:
        raise ValueError(f'{where} names {unknown}, and the backbone has no such modules')
