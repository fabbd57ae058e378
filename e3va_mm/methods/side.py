"""Side networks other than the highway."""

from __future__ import annotations

import contextlib
from functools import partial

import torch
from torch import Tensor, nn

from ..checks import check_count, check_kernel_sizes, check_number
from ..families.base import Family, Size, Stage
from .base import Method

# The gates' temperature in the paper's code: they move ten times faster than a plain sigmoid.
_TEMPERATURE = 0.1


class LST(Method):
    """Ladder side-tuning (Sung et al., arXiv 2206.06522); the backbone runs forward only, as for E³VA.

    A side network of blocks like the backbone's, ``reduction`` times narrower. Behind block ``i`` of the backbone::

        z_i = block_i(g_i * z_{i-1} + (1 - g_i) * down_i(x_i)),    g_i = sigmoid(a_i / 0.1)

    and a stage ends in ``norm(x + up(z))``, with the backbone's own, frozen output norm. Deviations: the side blocks
    start at random instead of from pruned weights; ``up`` starts at zero; between stages the side network has a patch
    merging of its own.

    Args:
        reduction: widths of the backbone over widths of the side network; the latter must divide by the heads.
    """

    swin_only = True

    def __init__(self, family: Family, reduction: int = 8) -> None:
        super().__init__(family)
        check_count('method.reduction', reduction)
        self.stages = nn.ModuleList()
        for index, stage in enumerate(family.stages):
            dims, stock = stage.embed_dims // reduction, family.backbone.stages[index]
            heads = stock.blocks[0].attn.w_msa.num_heads
            if dims < 1 or dims % heads:
                raise ValueError(
                    f'method.reduction={reduction} leaves stage {index} blocks of width {dims}, its {heads} heads '
                    'do not divide it'
                )
            blocks, merge = [_narrower(block, dims) for block in stock.blocks], None
            if index:
                merging = type(family.backbone.stages[index - 1].downsample)
                merge = merging(in_channels=dims // 2, out_channels=dims)
            self.stages.append(_SideStage(stage.embed_dims, dims, blocks, merge, stage.norm is not None))

    def run(self, family: Family, images: Tensor) -> tuple[Tensor, ...]:
        ends, sizes = _run_frozen(family, images)
        outputs, side = [], None
        for index, (stage, tokens, size) in enumerate(zip(self.stages, ends, sizes)):
            if index:
                side, _ = stage.merge(side, sizes[index - 1])
            side = stage(side, tokens, size)
            if family.stages[index].norm is not None:
                normed = family.module(family.stages[index].norm)(tokens[-1] + stage.up(side))
                outputs.append(normed.unflatten(1, size).permute(0, 3, 1, 2).contiguous())
        return tuple(outputs)


def _run_frozen(family: Family, images: Tensor) -> tuple[list[list[Tensor]], list[Size]]:
    """The tokens behind each block of each stage, and their size there."""
    ends: list[list[Tensor]] = [[] for _ in family.stages]
    sizes: list[Size] = [(0, 0) for _ in family.stages]

    def hear(stage: int, block: nn.Module, args: tuple, output: Tensor) -> None:
        ends[stage].append(output)
        sizes[stage] = tuple(args[1])

    with torch.no_grad(), contextlib.ExitStack() as hooks:
        for index, stage in enumerate(family.stages):
            for block in stage.blocks:
                hooks.callback(family.module(block.name).register_forward_hook(partial(hear, index)).remove)
        family.backbone(images)
    return ends, sizes


def _narrower(block: nn.Module, dims: int) -> nn.Module:
    """A new block like one of a Swin's stage, of width ``dims``."""
    attn = block.attn
    return type(block)(dims, attn.w_msa.num_heads, 4 * dims, window_size=attn.window_size, shift=attn.shift_size > 0)


class _SideStage(nn.Module):
    def __init__(
        self, dims: int, side_dims: int, blocks: list[nn.Module], merge: nn.Module | None, has_output: bool
    ) -> None:
        super().__init__()
        self.blocks, self.merge = nn.ModuleList(blocks), merge
        self.down = nn.ModuleList(nn.Linear(dims, side_dims) for _ in blocks)
        self.gates = nn.Parameter(torch.zeros(len(blocks)))
        if has_output:
            self.up = nn.Linear(side_dims, dims)
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

    def forward(self, side: Tensor | None, ends: list[Tensor], size: Size) -> Tensor:
        """Side state at the stage's start (B, L, C'), or none, and the backbone's blocks' outputs -> its end."""
        for gate, down, block, tokens in zip(torch.sigmoid(self.gates / _TEMPERATURE), self.down, self.blocks, ends):
            reduced = down(tokens)
            # Ahead of the first block there is nothing yet to weigh against.
            side = block(reduced if side is None else gate * side + (1 - gate) * reduced, size)
        return side


class DTL(Method):
    """Disentangled transfer learning (Fu et al., arXiv 2312.07856).

    From ``first_stage`` on, each stage has a side state ``h`` that starts at 0 and gathers, ahead of every block, a
    low-rank map of the block's input; behind each of the backbone's last blocks it is fed back::

        h = h + x A B,    x = block(x),    x = x + conv(h * sigmoid(beta * h))

    Gradient runs through the backbone from the first block that is fed, not before. The defaults are the authors' for
    Swin-B, where these are blocks 14 to 23 of 24 and the side state gathers from block 4.

    Args:
        rank: of the maps.
        beta: steepness of the activation.
        kernel_size: of a depthwise convolution, one a stage, before feeding back: DTL+ (5); 0 has none.
        first_stage: index of the first stage with a side state.
        num_fed_blocks: blocks at the end of the backbone that are fed.
    """

    swin_only = True

    def __init__(
        self,
        family: Family,
        rank: int = 4,
        beta: float = 100.0,
        kernel_size: int = 0,
        first_stage: int = 2,
        num_fed_blocks: int = 10,
    ) -> None:
        super().__init__(family)
        check_count('method.rank', rank)
        check_count('method.num_fed_blocks', num_fed_blocks)
        check_number('method.beta', beta)
        if kernel_size != 0 or isinstance(kernel_size, bool):
            check_kernel_sizes('method.kernel_size', [kernel_size])
        if isinstance(first_stage, bool) or first_stage not in range(len(family.stages)):
            raise ValueError(f'method.first_stage must be one of {[*range(len(family.stages))]}, got {first_stage!r}')
        fed = {block.name for block in family.blocks()[-num_fed_blocks:]}
        self.stages = nn.ModuleList()
        for index, stage in enumerate(family.stages[first_stage:], first_stage):
            if stage.blocks[-1].name not in fed:
                raise ValueError(f'method.num_fed_blocks={num_fed_blocks} leaves stage {index} without a fed block')
            self.stages.append(_SideState(family, stage, rank, beta, kernel_size, fed))


class _SideState(nn.Module):
    """The side state of one stage, and the hooks that move it along the stage's blocks."""

    def __init__(self, family: Family, stage: Stage, rank: int, beta: float, kernel_size: int, fed: set[str]) -> None:
        super().__init__()
        dims = stage.embed_dims
        self.beta, self.state = beta, None
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Linear(dims, rank, bias=False), nn.Linear(rank, dims, bias=False)) for _ in stage.blocks
        )
        for low_rank in self.maps:
            nn.init.zeros_(low_rank[1].weight)
        self.conv = None
        if kernel_size:
            self.conv = nn.Conv2d(dims, dims, kernel_size, padding='same', groups=dims, bias=False)
        for number, block in enumerate(stage.blocks):
            module = family.module(block.name)
            module.register_forward_pre_hook(partial(self.gather, number))
            if block.name in fed:
                module.register_forward_hook(partial(self.feed, block is stage.blocks[-1]))

    def gather(self, number: int, block: nn.Module, args: tuple) -> None:
        """Forward pre-hook of the block ``number``."""
        gathered = self.maps[number](args[0])
        self.state = gathered if number == 0 else self.state + gathered

    def feed(self, is_last: bool, block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Forward hook of a block that is fed."""
        fed = self.state * torch.sigmoid(self.beta * self.state)
        if self.conv is not None:
            fed = self.conv(fed.transpose(1, 2).unflatten(2, tuple(args[1]))).flatten(2).transpose(1, 2)
        if is_last:
            self.state = None
        return output + fed
