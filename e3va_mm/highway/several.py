"""Several highways along one frozen pass: of many tasks beside one backbone, each has its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .highway import Highway, HighwayPass, Size
from .tap_record import TapRecord


class HighwayPasses:
    """Several highways that go along the same frozen pass, each as far as it listens."""

    def __init__(self, highways: list[Highway]) -> None:
        self.passes = [HighwayPass(highway) for highway in highways]
        self.num_heard = [highway.num_heard for highway in highways]

    def tap(self, stage: int, tokens: Tensor, size: Size | None) -> None:
        for each in self._hearing(stage):
            each.tap(stage, tokens, size)

    def level(self, stage: int, tokens: Tensor, size: Size) -> None:
        for each in self._hearing(stage):
            each.level(stage, tokens, size)

    def start(self, stage: int, tokens: Tensor) -> None:
        for each in self._hearing(stage):
            each.start(stage, tokens)

    def _hearing(self, stage: int) -> list[HighwayPass]:
        return [each for each, num_heard in zip(self.passes, self.num_heard) if stage < num_heard]

    def finish(self, place: int) -> tuple[Tensor, ...]:
        """What :meth:`HighwayPass.finish` returns for one of the highways."""
        return self.passes[place].finish()


class JointRecord:
    """The same taps for several highways, none of which asks for a gradient: one product a tap serves all.

    Args:
        down_ins: ``P`` of each highway's adapters in the stage, (N, C, W); widths may differ.
    """

    def __init__(self, down_ins: Sequence[Tensor]) -> None:
        self._down_ins = down_ins
        self._joint: TapRecord | None = None

    def add(self, tap: Tensor) -> None:
        """See :meth:`TapRecord.add`."""
        if self._joint is None:
            self._joint = TapRecord(torch.cat([down_in.detach() for down_in in self._down_ins], 2).to(tap.dtype))
        self._joint.add(tap)

    def close(self) -> None:
        """Frees what only :meth:`add` needs."""
        self._joint.free_basis()

    def fill(self, record: TapRecord) -> None:
        """Gives the record of one of the highways its part, once all taps are there."""
        parts = self._joint.reduced.split([down_in.shape[2] for down_in in self._down_ins], 2)
        record.reduced = next(part for part, own in zip(parts, self._down_ins) if own is record.down_in)
        record.num_taps, record.shape = self._joint.num_taps, self._joint.shape


class DeferredPasses:
    """The same where no gradient is asked for: what is heard is kept, and each highway goes along at its finish.

    So the maps of one highway at a time are in memory. What is kept are the ends and starts of stages, which are the
    same for all, and the taps in rank space, to which one product a tap reduces them for all.
    """

    def __init__(self, highways: list[Highway]) -> None:
        self.highways = highways
        self.num_heard = [highway.num_heard for highway in highways]
        self.records: dict[int, JointRecord] = {}
        # Calls of a HighwayPass, in their order: its method, the stage, and further arguments.
        self.heard: list[tuple] = []

    def tap(self, stage: int, tokens: Tensor, size: Size | None) -> None:
        if stage not in self.records:
            stages = [each.stages[stage] for each in self.highways if stage < each.num_heard]
            self.records[stage] = JointRecord([each.adapters.down_in for each in stages])
            self.heard.append((HighwayPass.take_record, stage, self.records[stage].fill, size))
        self.records[stage].add(tokens)

    def level(self, stage: int, tokens: Tensor, size: Size) -> None:
        if stage in self.records:
            self.records[stage].close()
        # Copied, because in-place activations come next in many networks.
        self.heard.append((HighwayPass.level, stage, tokens.clone(), size))

    def start(self, stage: int, tokens: Tensor) -> None:
        self.heard.append((HighwayPass.start, stage, tokens.clone()))

    @torch.no_grad()
    def finish(self, place: int) -> tuple[Tensor, ...]:
        """See :meth:`HighwayPasses.finish`."""
        along = HighwayPass(self.highways[place])
        for call, stage, *args in self.heard:
            if stage < self.num_heard[place]:
                call(along, stage, *args)
        return along.finish()
