"""The fallback: where a highway can listen to any module that returns maps, found by running it once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import NamedTuple

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from .custom import CustomFamily

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# Heights and widths of probes; they differ, so that layouts show. Some networks want larger images, or square ones.
_PROBES = ((64, 96), (128, 256), (256, 384), (224, 224))
_MOST_PREFIXES = 8


class Call(NamedTuple):
    """A call of a module in a probe."""

    output: Tensor  # a copy: activations in place come next
    keeps_shape: bool  # whether it has read something of the same shape


class DiscoveredFamily(CustomFamily):
    """Any backbone that returns maps: these are the levels, and taps are the outputs of the blocks that lead to each.

    A block is an outermost module, other than a container, that reads and puts out what has the shape of a level; where
    a level has none, whatever puts out its shape.

    Raises:
        TypeError: it does not run, or returns something else than maps (B, C, H, W).
    """

    def __init__(self, backbone: nn.Module) -> None:
        was_training = backbone.training
        backbone.train(False)
        images, (returned, calls) = _probe(backbone)
        self.shown = None
        # Some return more in training; what the state is at a map must not depend on the mode.
        returned_in_training, calls_in_training = _run(backbone, images, training=True)
        if len(returned_in_training) != len(returned):
            self.shown = [_place(each, returned_in_training) for each in returned]
            returned, calls = returned_in_training, calls_in_training
        backbone.train(was_training)
        taps = _find_taps(backbone, returned, {name: each[0] for name, each in calls.items() if len(each) == 1})
        super().__init__(backbone, taps)
        layers = (name for name, module in backbone.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
        self.uncalled = tuple(name for name in layers if name not in calls)
        _report(backbone, taps)

    def run(self, images: Tensor):
        if self.shown is None:
            return super().run(images)
        # Of the backbone itself, which then returns all maps; its children stay as they are.
        mode, self.backbone.training = self.backbone.training, True
        try:
            return super().run(images)
        finally:
            self.backbone.training = mode

    def show(self, maps: list[Tensor], images: Tensor, training: bool):
        if self.shown is not None and not training:
            maps = [maps[index] for index in self.shown]
            return maps[0] if len(maps) == 1 else tuple(maps)
        return super().show(maps, images, training)


def _probe(backbone: nn.Module) -> tuple[Tensor, tuple[list[Tensor], dict[str, list[Call]]]]:
    """Noise that the backbone can take, and what :func:`_run` says of it."""
    channels = dict.fromkeys([3, input_channels(backbone)])
    sizes, error = probe_sizes(backbone), None
    for number in channels:
        for size in sizes:
            images = torch.randn(2, number, *size, generator=torch.Generator().manual_seed(0))
            images = images.to(next(backbone.parameters(), images).device)
            try:
                return images, _run(backbone, images, training=False)
            except Exception as failure:  # Whatever somebody's forward raises.
                error = failure
    raise TypeError(
        f'{type(backbone).__name__} could not be tried out with images of {sizes} to find where to listen: '
        f'{type(error).__name__}: {error}'
    ) from error


def input_channels(backbone: nn.Module) -> int:
    """Channels of the images that it reads, which its first convolution has."""
    stem = next((module for module in backbone.modules() if isinstance(module, nn.Conv2d)), None)
    return getattr(stem, 'in_channels', 3)


def probe_sizes(backbone: nn.Module) -> tuple[tuple[int, int], ...]:
    """Of images to try a backbone out with; its own comes last, for those whose positions know one alone (BEiT's)."""
    own = getattr(backbone, 'img_size', None)
    own = (own, own) if isinstance(own, int) else own
    return (*_PROBES, tuple(own)) if own else _PROBES


def _run(backbone: nn.Module, images: Tensor, training: bool) -> tuple[list[Tensor], dict[str, list[Call]]]:
    """The maps that it returns, and by name what its modules that are called put out, of what may be taps."""
    with torch.no_grad(), _recorded_calls(backbone) as calls:
        backbone.training = training
        try:
            returned = backbone(images)
        finally:
            backbone.training = False
    maps = [returned] if isinstance(returned, Tensor) else returned
    if not isinstance(maps, (list, tuple)) or not maps or not all(_is_map(each) for each in maps):
        raise TypeError('what it returns are no maps (B, C, H, W)')
    return [each for each in maps if each is not images], calls


def _is_map(value) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and len(value) == 2


@contextlib.contextmanager
def _recorded_calls(backbone: nn.Module) -> Iterator[dict[str, list[Call]]]:
    calls: dict[str, list[Call]] = {}

    def record(name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict, output) -> None:
            heard = calls.setdefault(name, [])
            output = output[0] if isinstance(output, (tuple, list)) and output else output
            if isinstance(output, Tensor) and output.ndim in (3, 4):
                given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
                keeps_shape = any(value.shape == output.shape for value in given)
                heard.append(Call(output.clone(), keeps_shape))

        return hook

    handles = [
        module.register_forward_hook(record(name), with_kwargs=True)
        for name, module in backbone.named_modules()
        if name
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _place(output: Tensor, among: list[Tensor]) -> int:
    return next(index for index, each in enumerate(among) if torch.equal(each, output))


def _find_taps(backbone: nn.Module, levels: list[Tensor], calls: dict[str, Call]) -> list[dict]:
    """The option ``taps`` of :class:`CustomFamily`."""
    order = {name: place for place, name in enumerate(calls)}
    ends = [_produced(level, calls) for level in levels]
    stages = []
    for level, end in zip(levels, ends):
        # Levels of one shape share its modules by when they are called.
        earlier = [other for each, other in zip(levels, ends) if each.shape == level.shape and other < end]
        first = max(earlier, default=-1)
        heard = {
            name: call
            for name, call in calls.items()
            if first < order[name] <= end and _prefix(call.output, level) is not None
        }
        names = _blocks(backbone, heard)
        stage = dict(taps=names, dims=level.shape[1])
        prefixes = {_prefix(heard[name].output, level) for name in names if heard[name].output.ndim == 3}
        if prefixes - {0}:
            stage['prefix'] = prefixes.pop()
        stages.append(stage)
    return stages


def _produced(level: Tensor, calls: dict[str, Call]) -> int:
    """The place of the last call whose output has the values of a level; behind all, where none has."""
    places = [place for place, call in enumerate(calls.values()) if _is_same(call.output, level)]
    return max(places, default=len(calls))


def _is_same(output: Tensor, level: Tensor) -> bool:
    prefix = _prefix(output, level)
    if prefix is None:
        return False
    if output.ndim == 3:
        output = output[:, prefix:].transpose(1, 2).reshape(level.shape)
    return torch.equal(output if output.shape == level.shape else output.permute(0, 3, 1, 2), level)


def _prefix(output: Tensor, level: Tensor) -> int | None:
    """How many tokens an output has ahead of a level's; None: it is of another size."""
    batch, dims, height, width = level.shape
    if output.ndim == 4:
        return 0 if output.shape in (level.shape, (batch, height, width, dims)) else None
    more = output.shape[1] - height * width
    return more if output.shape[::2] == (batch, dims) and 0 <= more <= _MOST_PREFIXES else None


def _blocks(backbone: nn.Module, heard: dict[str, Call]) -> list[str]:
    found = list(_outermost('', backbone, heard))
    modules = dict(backbone.named_modules())
    blocks = [name for name in found if heard[name].keeps_shape and any(modules[name].children())]
    return blocks or found


def _outermost(path: str, module: nn.Module, heard: dict[str, Call]) -> Iterator[str]:
    call = heard.get(path)
    if call and next(module.parameters(), None) is None:
        return
    if call and call.keeps_shape and not isinstance(module, _CONTAINERS):
        yield path
        return
    children = ((f'{path}.{name}' if path else name, child) for name, child in module.named_children())
    inner = [name for child_path, child in children for name in _outermost(child_path, child, heard)]
    yield from inner or ([path] if call else [])


def _report(backbone: nn.Module, taps: list[dict]) -> None:
    heard = '; '.join(f'{len(stage["taps"])} for the map of {stage["dims"]} channels' for stage in taps)
    print_log(
        f'{type(backbone).__name__} is of no known family. The highway listens to its modules: {heard}. '
        f'To have it listen elsewhere, change taps={taps}',
        logger='current',
        level=logging.INFO,
    )
