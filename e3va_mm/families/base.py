"""What a family of backbones says, and how a backbone is listened to while it runs.

A family says three things and runs nothing: where to listen (the modules that put out taps, and those that end
stages), how what is heard becomes tokens, and how the highway's state crosses to the next stage. The frozen pass is the
backbone's own forward; forward hooks hear it, and exist only while it runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..highway.highway import Size
from ..highway.tap_record import in_trace, records_gradient


class Block(NamedTuple):
    """A residual block, by the names of its modules in the backbone."""

    name: str
    taps: tuple[str, ...]  # their outputs are what the block adds to the residual stream, in this order
    norm1: str | None = None  # reads the block's input
    attention: str | None = None  # its output is added to the block's input
    mlp: str | None = None  # its output is added to the residual stream
    pools: bool = False  # whether attention puts out fewer tokens than it reads
    taps_inputs: bool = False  # whether taps are what the modules read, in place of what they put out


class Stage(NamedTuple):
    """A stage of the backbone."""

    blocks: list[Block]
    end: str | None  # name of the module whose output is the tokens at the end of the stage; None: a returned map is
    embed_dims: int
    norm: str | None  # name of the stage's output norm; None: the stage has no output
    crossing: str | None = None  # name of the module, if there is one, whose output is what ``carry`` makes of the end
    tap_dims: int | None = None  # channels of its taps, where those are not embed_dims


class Family:
    """A family of backbones; what a subclass does not say is as here.

    Args:
        backbone: the stock module, which keeps its code and its key names.
        stages: up to the last one that has an output.

    Attributes:
        layout: of what blocks read and put out: 'NLC' tokens; 'NLC+size', the same with their height and width as a
            further argument; 'NHWC'; 'NCHW'.
        num_prefix: tokens that are no patches (class, registers), ahead of the others.
        grid: name of the module whose output (B, H, W, C) tells the size of the patches' grid, where blocks do not.
        pools: whether the state crosses to the next stage by :meth:`pool`, once the size there is known.
        open_sizes: whether an exported graph can leave height and width of the images open.
        has_more: whether the backbone goes on behind the last stage that has an output.
        uncalled: names, or their ends, of layers whose weights are used without calling them: nothing put there acts.
    """

    layout = 'NLC+size'
    num_prefix = 0
    grid: str | None = None
    pools = False
    open_sizes = True
    has_more = False
    uncalled: tuple[str, ...] = ()
    # Whether its maps are in half precision where autocast is: those behind a norm are not.
    follows_autocast = False
    # Of what the backbone returns, see :meth:`returned_maps`.
    returns_one = False
    passes_images = False

    def __init__(self, backbone: nn.Module, stages: list[Stage]) -> None:
        self.backbone, self.stages = backbone, stages

    def module(self, name: str) -> nn.Module:
        """Found anew in each call, because layers may have been wrapped or replaced."""
        module = self.backbone
        for part in name.split('.'):
            # As get_submodule does, which takes ten times as long: there are fifty names a forward pass.
            module = module._modules[part]
        return module

    @property
    def norm_names(self) -> list[str]:
        """The output norms, in the backbone."""
        return [stage.norm for stage in self.stages if stage.norm is not None]

    def blocks(self) -> list[Block]:
        """All blocks, in the order of execution."""
        return [block for stage in self.stages for block in stage.blocks]

    def remember(self) -> None:
        """Called when the base weights have been loaded, before anything is trained."""

    def accelerate(self) -> None:
        """Replaces the calls of stock modules by faster equivalents that use their weights, for eval mode."""

    def forget_prepared(self) -> None:
        """Frees what those calls have prepared; the next ones do so again."""

    def enters_graph(self) -> bool:
        """Whether :meth:`run_block` can run on the highway's state."""
        return not self.num_prefix and not self.pools

    def replacements(self) -> dict[str, nn.Module]:
        """By the names of modules: what the frozen pass takes in their place."""
        return {}

    def published_norm(self, stage: Stage) -> nn.Module:
        """The output norm as it was before training where the frozen pass has that, else as it is."""
        return self.module(stage.norm)

    def added(self) -> set[str]:
        """Names of the backbone's parameters that published weights need not have, for what they start as is right."""
        return {f'{name}.{part}' for name in self.norm_names for part, _ in self.module(name).named_parameters()}

    def run(self, images: Tensor) -> Tensor | tuple | list:
        """The backbone's own forward."""
        return self.backbone(images)

    def returned_maps(self, returned: Tensor | tuple | list, images: Tensor) -> list[Tensor]:
        """The maps in what the backbone has returned; the images themselves, which some pass on, are none."""
        self.returns_one, outputs = isinstance(returned, Tensor), returned
        outputs = [returned] if self.returns_one else list(returned)
        if not in_trace():  # which has no values, and shapes that may be open
            self.passes_images = outputs[0].shape == images.shape and torch.equal(outputs[0], images)
        return outputs[self.passes_images :]

    def show(self, maps: list[Tensor], images: Tensor, training: bool) -> Tensor | tuple[Tensor, ...]:
        """The highway's maps as the backbone returns its own."""
        if self.returns_one:
            return maps[0]
        return (images, *maps) if self.passes_images else tuple(maps)

    def tap(self, stage: int, output: Tensor, grid: Size | None) -> tuple[Tensor, Size | None]:
        """A tap's output -> patch tokens (B, L, C), and their height and width where they show."""
        if output.ndim == 4:
            return self._from_map(output)
        return self._patches(output), None

    def level(self, stage: int, args: tuple, output: Tensor, grid: Size | None) -> tuple[Tensor, Size]:
        """What the end of a stage was called with and put out -> patch tokens (B, H * W, C) and (H, W)."""
        if output.ndim == 4:
            return self._from_map(output)
        return self._patches(output), tuple(args[1] if self.layout == 'NLC+size' else grid)

    def _patches(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.num_prefix :] if self.num_prefix else tokens

    def _from_map(self, output: Tensor) -> tuple[Tensor, Size]:
        if self.layout == 'NCHW':
            return output.flatten(2).transpose(1, 2), tuple(output.shape[2:])
        return output.flatten(1, 2), tuple(output.shape[1:3])

    def start(self, output: Tensor | tuple) -> Tensor:
        """The output of a stage's crossing -> frozen tokens (B, L, C) at the start of the next stage."""
        if isinstance(output, tuple):
            return output[0]
        return self._from_map(output)[0] if output.ndim == 4 else output

    def carry(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        """The highway's state (B, H * W, C) at the end of a stage -> at the start of the next, with its size there.

        Here it stays as it is: for backbones of one resolution.
        """
        return tokens, size

    def run_block(self, stage: int, number: int, tokens: Tensor, size: Size) -> Tensor:
        """Tokens (B, H * W, C) behind a block of a stage, with gradient; see :meth:`enters_graph`."""
        block = self.module(self.stages[stage].blocks[number].name)
        if self.layout == 'NLC+size':
            return block(tokens, size)
        if self.layout == 'NLC':
            return block(tokens)
        image = tokens.unflatten(1, size)
        return self._from_map(block(image if self.layout == 'NHWC' else image.permute(0, 3, 1, 2)))[0]


class HeardEnoughError(Exception):
    """Ends a frozen pass that has nothing more to say."""


class Listener:
    """Tells an ear what a backbone comes by while it runs; what the ear does meanwhile is not heard.

    Args:
        family: of the backbone.
        ear: its ``tap``, ``level`` and ``start`` are called, as those of a
            :class:`~e3va_mm.highway.highway.HighwayPass`.
        num_stages: how many stages it hears.
        ends_early: end the backbone's forward there.
    """

    def __init__(self, family: Family, ear, num_stages: int, ends_early: bool = False) -> None:
        self.family, self.ear, self.num_stages, self.ends_early = family, ear, num_stages, ends_early
        self.grid: Size | None = None
        self.is_hearing = True

    def sites(self) -> Iterator[tuple[str, Callable]]:
        """Names of modules, and what hears their arguments and outputs."""
        if self.family.grid is not None:
            yield self.family.grid, self._hear_grid
        for name, module in self.family.replacements().items():
            yield name, partial(self._replace, module)
        for index, stage in enumerate(self.family.stages[: self.num_stages]):
            for block in stage.blocks:
                yield from ((name, partial(self._hear_tap, index, block.taps_inputs)) for name in block.taps)
            if stage.end is not None:
                yield stage.end, partial(self._hear_level, index)
            if stage.crossing is not None:
                yield stage.crossing, partial(self._hear_start, index)

    def hook(self, hear: Callable, module: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        """Forward hook: lets ``hear`` hear, and replaces the output by what that returns."""
        if not self.is_hearing:
            return None
        self.is_hearing = False
        try:
            return hear((*args, *kwargs.values()) if kwargs else args, output)
        finally:
            self.is_hearing = True

    def _hear_grid(self, args: tuple, output: Tensor) -> None:
        self.grid = tuple(output.shape[1:3])

    def _replace(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return module(*args)

    def _hear_tap(self, stage: int, is_input: bool, args: tuple, output: Tensor) -> None:
        self.ear.tap(stage, *self.family.tap(stage, args[0] if is_input else output, self.grid))

    def _hear_level(self, stage: int, args: tuple, output: Tensor) -> None:
        self.ear.level(stage, *self.family.level(stage, args, output, self.grid))
        if self.ends_early and stage + 1 == self.num_stages:
            raise HeardEnoughError

    def hear_returned(self, maps: list[Tensor]) -> None:
        """Those of the stages that no module ends."""
        outputs = iter(maps)
        for index, stage in enumerate(self.family.stages[: self.num_stages]):
            output = None if stage.norm is None else next(outputs)
            if stage.end is None:
                self.ear.level(index, *self.family.level(index, (), output, self.grid))

    def _hear_start(self, stage: int, args: tuple, output: Tensor | tuple) -> None:
        self.ear.start(stage, self.family.start(output))


@contextlib.contextmanager
def listen(family: Family, ear, num_stages: int, ends_early: bool = False) -> Iterator[Listener]:
    """While this lasts, ``ear`` hears what the backbone comes by; the arguments are those of :class:`Listener`."""
    listener, handles = Listener(family, ear, num_stages, ends_early), []
    try:
        for name, hear in listener.sites():
            hook = partial(listener.hook, hear)
            handles.append(family.module(name).register_forward_hook(hook, with_kwargs=True))
        yield listener
    except HeardEnoughError:
        pass
    finally:
        for handle in handles:
            handle.remove()


class PoolingFamily(Family):
    """Backbones of maps (B, C, H, W) whose stages begin with whole blocks, which no gradient shall enter.

    From stage to stage the highway's state is average-pooled to the next size, and channels are dropped or added with
    zeros, as in ResNet's option A.
    """

    layout = 'NCHW'
    pools = True

    @staticmethod
    def add_output(backbone: nn.Module, index: int) -> str:
        """Gives a stage without an output norm one that does nothing; returns its name in the backbone."""
        backbone.add_module(f'e3va_norm{index}', nn.Identity())
        return f'e3va_norm{index}'

    def pool(self, stage: int, tokens: Tensor, size: Size, next_size: Size) -> Tensor:
        """Tokens (B, H * W, C) at the end of a stage -> (B, L, C') at the start of the next; keeps nothing."""
        pool = _Pooling.apply if records_gradient() else F.adaptive_avg_pool2d
        pooled = pool(tokens.unflatten(1, size).permute(0, 3, 1, 2), next_size).flatten(2).transpose(1, 2)
        return F.pad(pooled, (0, self.stages[stage + 1].embed_dims - tokens.shape[-1]))


class _Pooling(torch.autograd.Function):
    """Adaptive average pooling, of which autograd would keep the input for the sake of its shape."""

    @staticmethod
    def forward(ctx, image: Tensor, size: Size) -> Tensor:
        ctx.shape = image.shape
        return F.adaptive_avg_pool2d(image, size)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        like = grad.new_empty(1).expand(ctx.shape)
        return torch.ops.aten._adaptive_avg_pool2d_backward(grad.contiguous(), like), None
