"""Side networks other than the highway."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import check_count, check_kernel_sizes
from ..taps import BlockSites, Size, SwinTaps
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

    def __init__(self, taps: SwinTaps, reduction: int = 8) -> None:
        super().__init__(taps)
        check_count('method.reduction', reduction)
        self.stages = nn.ModuleList()
        for index, dims in enumerate(taps.embed_dims):
            side_dims = dims // reduction
            blocks = taps.narrower_blocks(index, side_dims)
            merge = taps.narrower_downsample(index - 1, side_dims // 2, side_dims) if index else None
            self.stages.append(_SideStage(dims, side_dims, blocks, merge, index in taps.out_indices))

    def run(self, taps: SwinTaps, images: Tensor) -> tuple[Tensor, ...]:
        norms, outputs, side = dict(zip(taps.out_indices, taps.norm_names)), [], None
        with torch.no_grad():
            tokens, size = taps.embed(images)
        for index, stage in enumerate(self.stages):
            if index:
                side, _ = stage.merge(side, size)
                with torch.no_grad():
                    tokens, size = taps.downsample(index - 1, tokens, size)
            ends = taps.block_outputs(index, tokens, size)
            tokens, side = ends[-1], stage(side, ends, size)
            if index in norms:
                normed = taps.backbone.get_submodule(norms[index])(tokens + stage.up(side))
                outputs.append(normed.unflatten(1, size).permute(0, 3, 1, 2).contiguous())
        return tuple(outputs)


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
        taps: SwinTaps,
        rank: int = 4,
        beta: float = 100.0,
        kernel_size: int = 0,
        first_stage: int = 2,
        num_fed_blocks: int = 10,
    ) -> None:
        super().__init__(taps)
        check_count('method.rank', rank)
        check_count('method.num_fed_blocks', num_fed_blocks)
        if kernel_size:
            check_kernel_sizes('method.kernel_size', [kernel_size])
        stages: dict[int, list[BlockSites]] = {}
        for sites in taps.blocks():
            stages.setdefault(sites.stage, []).append(sites)
        if first_stage not in stages:
            raise ValueError(f'method.first_stage must be one of {list(stages)}, got {first_stage!r}')
        fed = [sites.block for sites in taps.blocks()][-num_fed_blocks:]
        self.stages = nn.ModuleList()
        for index, blocks in stages.items():
            if index < first_stage:
                continue
            if blocks[-1].block not in fed:
                raise ValueError(f'method.num_fed_blocks={num_fed_blocks} leaves stage {index} without a fed block')
            self.stages.append(_SideState(blocks, rank, beta, kernel_size, fed))


class _SideState(nn.Module):
    """The side state of one stage, and the hooks that move it along the stage's blocks."""

    def __init__(self, blocks: list[BlockSites], rank: int, beta: float, kernel_size: int, fed: list) -> None:
        super().__init__()
        dims = blocks[0].embed_dims
        self.beta, self.state = beta, None
        self.maps = nn.ModuleList(
            nn.Sequential(nn.Linear(dims, rank, bias=False), nn.Linear(rank, dims, bias=False)) for _ in blocks
        )
        for low_rank in self.maps:
            nn.init.zeros_(low_rank[1].weight)
        self.conv = None
        if kernel_size:
            self.conv = nn.Conv2d(dims, dims, kernel_size, padding='same', groups=dims, bias=False)
        for number, sites in enumerate(blocks):
            sites.block.register_forward_pre_hook(_Gather(self, number))
            if sites.block in fed:
                sites.block.register_forward_hook(_Feed(self, sites is blocks[-1]))


class _Gather:
    """Forward pre-hook of a block."""

    def __init__(self, side: _SideState, number: int) -> None:
        self.side, self.number = side, number

    def __call__(self, block: nn.Module, args: tuple) -> None:
        gathered = self.side.maps[self.number](args[0])
        self.side.state = gathered if self.number == 0 else self.side.state + gathered


class _Feed:
    """Forward hook of a block."""

    def __init__(self, side: _SideState, is_last: bool) -> None:
        self.side, self.is_last = side, is_last

    def __call__(self, block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        state = self.side.state
        fed = state * torch.sigmoid(self.side.beta * state)
        if self.side.conv is not None:
            fed = self.side.conv(fed.transpose(1, 2).unflatten(2, tuple(args[1]))).flatten(2).transpose(1, 2)
        if self.is_last:
            self.side.state = None
        return output + fed
