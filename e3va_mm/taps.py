"""Where a backbone family keeps its tap points and stage transitions: the one place to teach it a new family.

A family is a class with the interface of :class:`SwinTaps` and an entry in :data:`FAMILIES`. It calls the stock
modules of the wrapped backbone and copies none of their code.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stages import MiTStages, Size, Stages
from .window_attention import WindowLayout, fused_window_attention, window_bias, window_layout

# All blocks of a stage.
WHOLE = slice(None)


class BlockSites(NamedTuple):
    """A transformer block and the modules in it at which methods act."""

    block: nn.Module  # called with (tokens, size)
    norm1: nn.Module | None  # reads the block's input
    attention: nn.Module | None  # reads normalised tokens; its output is added to the block's input
    mlp: nn.Module | None  # its output is added to the residual stream
    embed_dims: int
    stage: int


class StageStart(NamedTuple):
    tokens: Tensor  # frozen
    size: Size
    carried: Tensor  # what the highway's state would be without deltas


class SwinTaps:
    """Swin Transformer (arXiv 2103.14030) as in mmseg and mmdet.

    Taps: the output of (shifted-)window attention and the output of the MLP, both before their residual addition.
    Stock attention is replaced by its fused equivalent; attention of another class runs as it is.

    Args:
        backbone: the stock module.
        compile_blocks: run the blocks through ``torch.compile``, which fuses norms, casts and activations. Each image
            size takes two graphs a stage; past ``torch._dynamo.config.recompile_limit`` (8: the first batch shape of a
            four-stage Swin) other shapes run uncompiled.

    Attributes:
        out_indices: stages that have an output.
        embed_dims: width of each stage.
        block_taps: of each stage, the number of taps in each of its blocks.
        norm_names: the output norms, in the backbone.
        state_enters_blocks: whether the highway's state at the start of a stage is what its blocks take.
    """

    state_enters_blocks = True

    def __init__(self, backbone: nn.Module, compile_blocks: bool = False) -> None:
        self.backbone = backbone
        self.out_indices = tuple(backbone.out_indices)
        # Stages behind the last output would never get a gradient, and DDP would wait for it.
        self.num_stages = max(self.out_indices) + 1
        self.embed_dims = list(backbone.num_features[: self.num_stages])
        self.block_taps = [[2] * len(stage.blocks) for stage in backbone.stages[: self.num_stages]]
        self.norm_names = [f'norm{index}' for index in self.out_indices]
        self._biases: dict[tuple[int, int], tuple[tuple, Tensor]] = {}
        self._run_block = torch.compile(_run_block, dynamic=False) if compile_blocks else _run_block

    def embed(self, images: Tensor) -> tuple[Tensor, Size]:
        """Images (B, 3, H, W) -> tokens (B, L, C) and their height and width."""
        tokens, size = self.backbone.patch_embed(images)
        if self.backbone.use_abs_pos_embed:
            tokens = tokens + self.backbone.absolute_pos_embed
        return self.backbone.drop_after_pos(tokens), size

    @torch.no_grad()
    def run_stage(
        self, index: int, tokens: Tensor, size: Size, visit: Callable[[Tensor], None], blocks: slice = WHOLE
    ) -> Tensor:
        """Runs the blocks of a stage, or some of them, without gradient.

        Args:
            index: the stage.
            tokens: at the start of the first block that is run, (B, L, C).
            size: their height and width.
            visit: is called with every tap, (B, L, C), in the order of execution.
            blocks: which to run.

        Returns:
            The tokens behind the last of them, before the stage's downsampling.
        """
        return self.run_blocks(index, tokens, size, blocks, visit)

    def run_blocks(
        self,
        index: int,
        tokens: Tensor,
        size: Size,
        blocks: slice = WHOLE,
        visit: Callable[[Tensor], None] = lambda tap: None,
    ) -> Tensor:
        """:meth:`run_stage`, with gradient where that is enabled."""
        for number, block in list(enumerate(self.backbone.stages[index].blocks))[blocks]:
            prepared = self._prepared((index, number), block, tokens, size)
            tokens, *taps = self._run_block(block, tokens, size, *prepared)
            for tap in taps:
                visit(tap)
        return tokens

    def _prepared(self, key: tuple[int, int], block: nn.Module, tokens: Tensor, size: Size):
        """Layout and bias of the fused attention; none for attention of another class."""
        attn = block.attn
        if (type(attn).__name__, type(attn.w_msa).__name__) != ('ShiftWindowMSA', 'WindowMSA'):
            return None, None
        layout = window_layout(len(tokens), tuple(size), attn.window_size, attn.shift_size, tokens.device)
        return layout, self._bias(key, attn, tokens)

    def _bias(self, key: tuple[int, int], attn: nn.Module, tokens: Tensor) -> Tensor:
        """The block's bias, prepared again only when its table has been written to or has moved."""
        table, device = attn.w_msa.relative_position_bias_table, tokens.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tokens.dtype
        state = (dtype, table.device, table.data_ptr(), table._version)
        cached, bias = self._biases.get(key, (None, None))
        if cached != state:
            bias = window_bias(attn.w_msa, attn.shift_size, dtype)
            self._biases[key] = state, bias
        return bias

    def remember(self) -> None:
        """Called when the base weights have been loaded, before anything is trained."""

    def patches(self, tokens: Tensor) -> Tensor:
        """Tokens without those that are no patches."""
        return tokens

    def with_patches(self, tokens: Tensor, patches: Tensor) -> Tensor:
        """``tokens`` with other patches, in their dtype."""
        return patches.to(tokens.dtype)

    def follow(self, index: int, tokens: Tensor, size: Size) -> StageStart:
        """From the end of a stage to the start of the next."""
        tokens, size = self.downsample(index, tokens, size)
        return StageStart(tokens, size, tokens)

    def carry(self, index: int, state: Tensor, size: Size, next_size: Size) -> Tensor:
        """The highway's state at the end of a stage -> at the start of the next."""
        return self.downsample(index, state, size)[0]

    def block_outputs(self, index: int, tokens: Tensor, size: Size) -> list[Tensor]:
        """Tokens at a stage's start -> the tokens behind each of its blocks, without gradient."""
        outputs, taps = [tokens], []

        def visit(tap: Tensor) -> None:
            taps.append(tap)
            if len(taps) == 2:
                outputs.append(outputs[-1] + taps[0] + taps[1])
                taps.clear()

        self.run_stage(index, tokens, size, visit)
        return outputs[1:]

    def blocks(self) -> Iterator[BlockSites]:
        """Where methods that insert modules find a block's parts, in the order of execution."""
        for index, dims in enumerate(self.embed_dims):
            for block in self.backbone.stages[index].blocks:
                yield BlockSites(block, block.norm1, block.attn, block.ffn.layers, dims, index)

    def narrower_blocks(self, index: int, dims: int) -> list[nn.Module]:
        """New blocks like those of a stage, of width ``dims``, for a side network."""
        blocks = []
        for block in self.backbone.stages[index].blocks:
            attn, heads = block.attn, block.attn.w_msa.num_heads
            if dims < 1 or dims % heads:
                raise ValueError(f'blocks of width {dims} can not have the {heads} heads of stage {index}')
            shift = attn.shift_size > 0
            blocks.append(type(block)(dims, heads, 4 * dims, window_size=attn.window_size, shift=shift))
        return blocks

    def narrower_downsample(self, index: int, dims: int, out_dims: int) -> nn.Module:
        """A new patch merging like that of a stage, for a side network."""
        return type(self.backbone.stages[index].downsample)(in_channels=dims, out_channels=out_dims)

    def downsample(self, index: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        """The stage's own patch merging."""
        merging = self.backbone.stages[index].downsample
        return _merge_patches(merging, tokens, size) if _merges_2x2(merging) else merging(tokens, size)


class StagedTaps:
    """The interface of :class:`SwinTaps` for backbones with a description in :mod:`~e3va_mm.stages`.

    Taps are read by forward hooks, which exist only while a stage runs.

    Args:
        backbone: the stock module.
        stages: its description.
        out_stages: the stages that have an output.
        norm_names: their output norms, in the backbone.
    """

    def __init__(self, backbone: nn.Module, stages: Stages, out_stages: Iterable[int], norm_names: list[str]) -> None:
        self.backbone, self.stages = backbone, stages
        self.out_indices, self.norm_names = tuple(out_stages), list(norm_names)
        self.num_stages = max(self.out_indices) + 1
        self.embed_dims = self.stages.embed_dims[: self.num_stages]
        # Of each stage, of each block.
        self.branches = [
            [self.stages.branches(block) for block in blocks] for blocks in self.stages.blocks[: self.num_stages]
        ]
        self.block_taps = [[len(modules) for modules in blocks] for blocks in self.branches]
        self.state_enters_blocks = not stages.num_prefix and self._carries_as_it_advances()

    def _carries_as_it_advances(self) -> bool:
        return type(self.stages).carry is Stages.carry

    def remember(self) -> None:
        self.stages.remember()

    def embed(self, images: Tensor) -> tuple[Tensor, Size]:
        tokens, size = self.stages.embed(images)
        # In half precision, the residual stream would lose what the later blocks add.
        return tokens.to(torch.promote_types(tokens.dtype, torch.float32)), size

    @torch.no_grad()
    def run_stage(
        self, index: int, tokens: Tensor, size: Size, visit: Callable[[Tensor], None], blocks: slice = WHOLE
    ) -> Tensor:
        def read(module: nn.Module, args: tuple, output: Tensor) -> None:
            visit(self.stages.arrange(module, output, size))

        with contextlib.ExitStack() as hooks:
            for module in itertools.chain.from_iterable(self.branches[index][blocks]):
                hooks.callback(module.register_forward_hook(read).remove)
            return self.run_blocks(index, tokens, size, blocks)

    def run_blocks(self, index: int, tokens: Tensor, size: Size, blocks: slice = WHOLE) -> Tensor:
        for block in self.stages.blocks[index][blocks]:
            tokens = self.stages.run_block(block, tokens, size)
        return tokens

    def patches(self, tokens: Tensor) -> Tensor:
        return tokens[:, self.stages.num_prefix :]

    def with_patches(self, tokens: Tensor, patches: Tensor) -> Tensor:
        return torch.cat([tokens[:, : self.stages.num_prefix], patches.to(tokens.dtype)], dim=1)

    def follow(self, index: int, tokens: Tensor, size: Size) -> StageStart:
        following, next_size = self.stages.advance(index, tokens, size)
        if self._carries_as_it_advances():
            return StageStart(following, next_size, self.patches(following))
        return StageStart(following, next_size, self.stages.carry(index, tokens, size, next_size))

    def carry(self, index: int, state: Tensor, size: Size, next_size: Size) -> Tensor:
        return self.stages.carry(index, state, size, next_size)

    def blocks(self) -> Iterator[BlockSites]:
        for index, dims in enumerate(self.embed_dims):
            for block in self.stages.blocks[index]:
                parts = [getattr(block, name, None) for name in ('norm1', 'attn', 'mlp')]
                yield BlockSites(block, *parts, dims, index)


def _run_block(block: nn.Module, tokens: Tensor, size: Size, layout: WindowLayout | None, bias: Tensor | None):
    """Tokens behind a block, and its two taps."""
    normed = block.norm1(tokens)
    if layout is None:
        attended = block.attn(normed, size)
    else:
        attended = fused_window_attention(normed, block.attn.w_msa, layout, bias)
    tokens = tokens + attended
    # FFN.forward adds the residual itself; its `layers` are the MLP alone.
    transformed = block.ffn.layers(block.norm2(tokens))
    return tokens + transformed, attended, transformed


def _merges_2x2(merging: nn.Module) -> bool:
    sampler, padding = merging.sampler, getattr(merging.adap_padding, 'padding', None)
    geometry = (sampler.kernel_size, sampler.stride, sampler.dilation, padding)
    return geometry == ((2, 2), (2, 2), (1, 1), 'corner') and merging.norm is not None


def _merge_patches(merging: nn.Module, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
    """What the stock module computes with ``nn.Unfold``, which runs a kernel an image and transposes twice."""
    height, width = size
    grid = F.pad(tokens.unflatten(1, (height, width)), (0, 0, 0, width % 2, 0, height % 2))
    patches = grid.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 5, 2, 4)
    rows, columns = patches.shape[1:3]
    patches = patches.reshape(len(tokens), rows * columns, -1)
    return merging.reduction(merging.norm(patches)), (rows, columns)


def _timm_taps(backbone: nn.Module, compile_blocks: bool) -> StagedTaps:
    _refuse_compilation(backbone, compile_blocks)
    return StagedTaps(backbone, backbone.stages, backbone.out_stages, backbone.norm_names)


def _mit_taps(backbone: nn.Module, compile_blocks: bool) -> StagedTaps:
    _refuse_compilation(backbone, compile_blocks)
    norm_names = [f'layers.{index}.2' for index in backbone.out_indices]
    return StagedTaps(backbone, MiTStages(backbone), backbone.out_indices, norm_names)


def _refuse_compilation(backbone: nn.Module, compile_blocks: bool) -> None:
    if compile_blocks:
        raise ValueError(f'compile_frozen=True is for SwinTransformer only, not for {type(backbone).__name__}')


FAMILIES = {
    ('mmseg', 'SwinTransformer'): SwinTaps,
    ('mmdet', 'SwinTransformer'): SwinTaps,
    ('mmseg', 'MixVisionTransformer'): _mit_taps,
    ('e3va_mm', 'TIMMFeatures'): _timm_taps,
}


def build_taps(backbone: nn.Module, compile_blocks: bool = False) -> SwinTaps | StagedTaps:
    """The family of ``backbone``, subclasses included.

    Raises:
        TypeError: no family is known; the message lists the supported ones.
    """
    for cls in type(backbone).__mro__:
        family = FAMILIES.get((cls.__module__.partition('.')[0], cls.__name__))
        if family:
            return family(backbone, compile_blocks)
    raise TypeError(f'unsupported backbone.type {type(backbone).__name__!r}; supported are {supported_backbones()}')


def supported_backbones() -> str:
    return ', '.join(f'{package}.{name}' for package, name in FAMILIES)
