"""Side networks other than the highway: the backbone runs forward only, as for E³VA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..taps import Size, SwinTaps
from .base import Method, check_positive

# The gates' temperature in the paper's code: they move ten times faster than a plain sigmoid.
_TEMPERATURE = 0.1


class LST(Method):
    """Ladder side-tuning (Sung et al., arXiv 2206.06522).

    A side network of blocks like the backbone's, ``reduction`` times narrower. Behind block ``i`` of the backbone::

        z_i = block_i(g_i * z_{i-1} + (1 - g_i) * down_i(x_i)),    g_i = sigmoid(a_i / 0.1)

    and a stage ends in ``norm(x + up(z))``, with the backbone's own, frozen output norm. Deviations: the side blocks
    start at random instead of from pruned weights; ``up`` starts at zero; between stages the side network has a patch
    merging of its own.

    Args:
        reduction: widths of the backbone over widths of the side network; the latter must divide by the heads.
    """

    def __init__(self, taps: SwinTaps, reduction: int = 8) -> None:
        super().__init__(taps)
        check_positive('reduction', reduction)
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
