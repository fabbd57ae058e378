"""One frozen base and one frozen pass for several highways."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..checkpoints.fingerprint import fingerprint, named_tensors
from ..families.base import Stage
from ..families.discovered import input_channels, probe_sizes
from ..highway.several import DeferredPasses, HighwayPasses
from .base import FrozenBackbone
from .e3va import E3VABackbone
from .tuned import TunedBackbone


class InputMismatchError(ValueError):
    """Models that share a frozen pass have made other inputs of one image; ``other`` is the one that came first."""

    def __init__(self, message: str, other: str) -> None:
        super().__init__(message)
        self.other = other


class _Pass(NamedTuple):
    """A frozen pass."""

    name: str  # who has asked for it
    images: Tensor  # (B, C, H, W)
    heard: HighwayPasses | DeferredPasses
    waiting: dict[str, int]  # who has not yet fetched its maps, and its place among those who have heard


class SharedPass:
    """Wrappers whose frozen tensors are the same objects, and who hear one frozen pass together.

    Each keeps what it trains, output norms included, and works by itself as before; only within :meth:`one_image` the
    first that is called runs the pass for all, and the others fetch their maps. A model that calls its backbone several
    times an image (sliding windows) does so with the others in step.

    Args:
        device: where the models go.
    """

    def __init__(self, device: str | torch.device) -> None:
        self.device = device
        self.members: dict[str, E3VABackbone] = {}
        self._passes: list[_Pass] | None = None

    def join(self, name: str, model: nn.Module) -> None:
        """Gives the one wrapper in a model the base of the others, frees its own, and moves the model to the device.

        Raises:
            ValueError: it has no highway, or another base; the message says in what it differs.
        """
        wrapper = _highway_of(name, model)
        other, first = next(iter(self.members.items()), (name, wrapper))
        reason = base_difference(first, wrapper)
        if not reason:
            # The base goes first, so that the device never holds a second one.
            _share_tensors(first, wrapper)
            model.to(self.device)
            reason = _other_maps(*sorted([first, wrapper], key=_num_stages, reverse=True))
        if reason:
            raise ValueError(f'the frozen base of {name!r} is not that of {other!r}: {reason}')
        self.members[name] = wrapper
        wrapper.forward = partial(self._serve, name)

    def leave(self, name: str) -> None:
        """Takes a member out; it still works by itself."""
        del self.members.pop(name).forward

    @contextlib.contextmanager
    def one_image(self) -> Iterator[None]:
        """While this lasts, the calls of all members are about the same images."""
        self._passes, self._calls = [], dict.fromkeys(self.members, 0)
        try:
            yield
        finally:
            self._passes = None

    def _serve(self, name: str, images: Tensor) -> tuple[Tensor, ...]:
        """The forward of a member."""
        if self._passes is None:
            return _by_itself(self.members[name], images)
        number = self._calls[name]
        self._calls[name] += 1
        if number == len(self._passes):
            leader = max(self.members.values(), key=_num_stages)
            heard = leader.hear_together(list(self.members.values()), images)
            waiting = {member: place for place, member in enumerate(self.members)}
            self._passes.append(_Pass(name, images, heard, waiting))
        shared = self._passes[number]
        _check_same_images(shared, name, images)
        if len(shared.waiting) == 1:
            # The last one leaves nothing behind.
            self._passes[number] = shared._replace(heard=None)
        return self.members[name].maps_of(shared.heard, shared.waiting.pop(name), images)


def _highway_of(name: str, model: nn.Module) -> E3VABackbone:
    """The one wrapped backbone of a model.

    Raises:
        ValueError: it has another, or none.
    """
    found = [module for module in model.modules() if isinstance(module, FrozenBackbone)]
    if len(found) == 1 and isinstance(found[0], E3VABackbone):
        return found[0]
    kinds = [f'one tuned by {type(each.method).__name__}' for each in found if isinstance(each, TunedBackbone)]
    what = ' and '.join(kinds) or f'{len(found)} of them'
    raise ValueError(f'to share a frozen pass, a model needs one backbone that is an E3VABackbone; {name!r} has {what}')


def _by_itself(wrapper: E3VABackbone, images: Tensor) -> tuple[Tensor, ...]:
    return type(wrapper).forward(wrapper, images)


def _num_stages(wrapper: E3VABackbone) -> int:
    return len(wrapper.family.stages)


def _check_same_images(shared: _Pass, name: str, images: Tensor) -> None:
    if images is shared.images or torch.equal(images, shared.images):
        return
    shapes = f'{tuple(images.shape)}, not {tuple(shared.images.shape)}'
    what = shapes if images.shape != shared.images.shape else 'other values'
    message = f'{name!r} and {shared.name!r} make other inputs of an image, so one pass can not serve both: {what}'
    raise InputMismatchError(message, shared.name)


def base_difference(one: E3VABackbone, other: E3VABackbone) -> str:
    """In words, how two frozen bases differ in weights, precision, or where highways listen; '' where they do not."""
    dtype, others = (each._quantised_dtype or each.frozen_dtype for each in (one, other))
    if dtype != others:
        return f'frozen_dtype is {others}, not {dtype}'
    if type(one.family) is not type(other.family) or not _listen_alike(one.family.stages, other.family.stages):
        return f'a {type(other.backbone).__name__} with other blocks than that {type(one.backbone).__name__}'
    hashes, others = _hashes(one), _hashes(other)
    # An output norm of one may be a frozen one of the other.
    names = [name for name in hashes | others if name not in one._trained_base | other._trained_base]
    differing = [name for name in names if hashes.get(name) != others.get(name)]
    # What the pass has in place of trained norms, as far as both hear it.
    norms, others = ({name: _state(norm) for name, norm in each.family.replacements().items()} for each in (one, other))
    differing += [name for name in norms if norms[name] != others.get(name, norms[name])]
    if not differing:
        return ''
    listed = ', '.join(differing[:3]) + (', …' if len(differing) > 3 else '')
    return f'{len(differing)} of its {len(names)} frozen tensors have other values: {listed}'


def _listen_alike(stages: list[Stage], others: list[Stage]) -> bool:
    if any(stage.end is None for stage in stages):
        return stages == others  # Its ends are the maps that are returned.
    # How many stages there are, and which have outputs, is each highway's own.
    pairs = [[stage._replace(norm=None, crossing=None) for stage in pair] for pair in zip(stages, others)]
    return all(stage == other for stage, other in pairs)


def _hashes(wrapper: E3VABackbone) -> dict[str, int]:
    return dict(zip(wrapper._base_names, wrapper.base_fingerprint().tolist()))


def _state(module: nn.Module) -> list[int]:
    return fingerprint(named_tensors(module)).tolist()


def _share_tensors(leader: E3VABackbone, wrapper: E3VABackbone) -> None:
    """Puts the leader's frozen tensors in the place of those of ``wrapper``."""
    theirs, own = leader._frozen_tensors(), wrapper._frozen_tensors()
    for name in theirs.keys() & own.keys():
        path, _, leaf = name.rpartition('.')
        module = wrapper.backbone.get_submodule(path)
        tensors = module._parameters if isinstance(theirs[name], nn.Parameter) else module._buffers
        tensors[leaf] = theirs[name]
    if wrapper._quantised:
        wrapper._quantised.take(wrapper.backbone, leader.backbone)
    wrapper.list_parameters()


@torch.no_grad()
def _other_maps(leader: E3VABackbone, wrapper: E3VABackbone) -> str:
    """In words, how maps by a leader's frozen pass differ from those by a wrapper's own; '' where they do not.

    Weights do not tell all: heads of attention, activations or window shifts are settings of the config.
    """
    size, generator = probe_sizes(wrapper.backbone)[-1], torch.Generator().manual_seed(0)
    images = torch.randn(1, input_channels(wrapper.backbone), *size, generator=generator)
    images = images.to(next(wrapper.parameters()).device)
    own, shared = _by_itself(wrapper, images), wrapper.maps_of(leader.hear_together([wrapper], images), 0, images)
    # Where the pass is the leader's, these would be in memory for nothing.
    wrapper.family.forget_prepared()
    own, shared = ([maps] if isinstance(maps, Tensor) else maps for maps in (own, shared))
    for stage, (one, other) in enumerate(zip(own, shared)):
        if one.shape != other.shape or not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * one.abs().max().item()):
            return f'with the same weights, map {stage} comes out otherwise; compare the settings in backbone.backbone'
    return ''
