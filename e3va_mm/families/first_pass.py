"""Checked, not believed: whether what the highway hears is what the backbone returns."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..highway.highway import normed_map
from ..highway.several import DeferredPasses, HighwayPasses
from .base import Family, Size


class FirstPass:
    """An ear that lets highways hear a frozen pass, and compares the ends of the stages with what comes out.

    Args:
        family: of the backbone.
        along: the highways; stages that one of them does not hear are in its graph.
    """

    def __init__(self, family: Family, along: HighwayPasses | DeferredPasses) -> None:
        self.family, self.along, self.num_heard = family, along, min(along.num_heard)
        self.maps: dict[int, Tensor] = {}
        self.before: tuple[Tensor, Size] | None = None
        self.heard: set[int] = set()

    def tap(self, stage: int, tokens: Tensor, size: Size | None) -> None:
        self.along.tap(stage, tokens, size)

    def level(self, stage: int, tokens: Tensor, size: Size) -> None:
        declared = self.family.stages[stage]
        if declared.norm is not None:
            self.maps[stage] = normed_map(self.family.published_norm(declared), tokens, size)
        if stage >= self.num_heard:
            self._compare(stage, self._through_blocks(stage), tokens, 'behind its blocks, called one by one,')
        self.before = tokens, size
        self.heard.add(stage)
        self.along.level(stage, tokens, size)

    def start(self, stage: int, tokens: Tensor) -> None:
        carried, _ = self.family.carry(stage, *self.before)
        self._compare(stage, carried, tokens, f'behind {self.family.stages[stage].crossing!r}')
        self.along.start(stage, tokens)

    def _through_blocks(self, stage: int) -> Tensor:
        """What the highway's state is at the end of a stage in the graph, where nothing has been trained."""
        tokens, size = self.family.carry(stage - 1, *self.before)
        for number in range(len(self.family.stages[stage].blocks)):
            tokens = self.family.run_block(stage, number, tokens, size)
        return tokens

    def compare(self, returned: Sequence[Tensor]) -> None:
        """Makes sure that the heard levels, through their norms, are the maps that the backbone has returned.

        Raises:
            ValueError: they are not; the message names the stage.
        """
        stages = self.family.stages
        silent = [index for index, stage in enumerate(stages) if index not in self.heard and stage.end is not None]
        if silent:
            ends = [stages[index].end for index in silent]
            raise self._refusal(silent[0], f'{ends} were not called')
        expected = [index for index, stage in enumerate(stages) if stage.norm is not None]
        if len(returned) != len(expected):
            raise self._refusal(expected[-1], f'it returns {len(returned)} maps, not {len(expected)}')
        for (stage, heard), output in zip(self.maps.items(), returned):
            self._compare(stage, heard, output, f'at {self.family.stages[stage].end!r}, behind the norm,')

    def _compare(self, stage: int, heard: Tensor, own: Tensor, where: str) -> None:
        if heard.shape != own.shape:
            raise self._refusal(stage, f'the shape {where} is {tuple(heard.shape)}, and its own {tuple(own.shape)}')
        heard, own = heard.float().nan_to_num(), own.float().nan_to_num()
        if heard.numel() and (heard - own).abs().max() > 1e-3 * own.abs().max():
            difference = (heard - own).abs().max().item()
            raise self._refusal(stage, f'values {where} differ from its own by {difference:.2g}')

    def _refusal(self, stage: int, reason: str) -> ValueError:
        name = type(self.family.backbone).__name__
        return ValueError(
            f'the highway can not go along stage {stage} of this {name}: {reason}. A subclass, a plugin, or an entry '
            f'of taps makes it other than {type(self.family).__name__} takes it to be'
        )
