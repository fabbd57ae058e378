"""timm's Hiera (arXiv 2306.00989), also with absolute window position embeddings (arXiv 2311.05613).

The first block of a stage pools: its residual branch is ``pool(proj(norm1(x)))``, and its attention pools the queries
of the unpooled tokens. So the frozen stream enters a stage as it left the one before, and the highway's state goes
through the residual branch alone, with its frozen weights: the highway's formula starts from there.

Hiera keeps tokens in an order in which windows are contiguous. Ours are in rows, and are put in Hiera's order for each
block by timm's own modules, which are made for the size of the image.
"""

from __future__ import annotations

import copy
import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .stages import Size, from_nchw, to_nchw
from .timm_stages import TIMMStages, pad_to, resample_nhwc


class HieraStages(TIMMStages):
    """Stages end where timm's do; images are padded to whole mask units."""

    unused = ('head',)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        starts = [0, *(end + 1 for end in model.stage_ends)]
        self.blocks = [list(model.blocks[start:stop]) for start, stop in itertools.pairwise(starts)]
        self.levels = list(range(len(self.blocks)))

    def embed(self, images: Tensor) -> tuple[Tensor, Size]:
        stride, unit = self.model.patch_stride[0], self.model.mask_unit_size[0]
        images = pad_to(images, stride * unit)
        size = tuple(length // stride for length in images.shape[2:])
        return self._position(self.model.patch_embed(images), size), size

    def _position(self, tokens: Tensor, size: Size) -> Tensor:
        if self.model.pos_embed_win is not None:
            # What timm's own method tiles and resamples by.
            self.model.mask_spatial_shape = [length // unit for length, unit in zip(size, self.model.mask_unit_size)]
            return self.model._pos_embed(tokens)
        table = self.model.pos_embed.unflatten(1, self.model.tokens_spatial_shape)
        return tokens + resample_nhwc(table, size).flatten(1, 2)

    def advance(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        return tokens, tuple(length // stride for length, stride in zip(size, self._pooling(stage + 1)))

    def carry(self, stage: int, tokens: Tensor, size: Size, next_size: Size) -> Tensor:
        block, stride = self.blocks[stage + 1][0], self._pooling(stage + 1)
        if block.proj is not None:
            pooled = F.max_pool2d(to_nchw(block.proj(block.norm1(tokens)), size), stride)
        else:
            image = to_nchw(tokens, size)
            pooled = torch.cat([F.max_pool2d(image, stride), F.avg_pool2d(image, stride)], dim=1)
        return from_nchw(pooled)[0]

    def run_block(self, block: nn.Module, tokens: Tensor, size: Size) -> Tensor:
        stage = self.embed_dims.index(block.dim_out)
        if block.do_expand:
            finer = tuple(length * stride for length, stride in zip(size, self._pooling(stage)))
            unrolled = self._unroll(tokens, stage - 1, finer)
        else:
            unrolled = self._unroll(tokens, stage, size)
        return self.arrange(block, block(unrolled), size)

    def arrange(self, branch: nn.Module, output: Tensor, size: Size) -> Tensor:
        """From Hiera's order to rows."""
        from timm.models.hiera import Reroll

        stage, model = self.embed_dims.index(output.shape[-1]), self.model
        scale = [stride ** self._num_poolings(stage) for stride in model.q_stride]
        full = [length * factor for length, factor in zip(size, scale)]
        reroll = Reroll(full, (1, 1), self._schedule(0), model.stage_ends, model.q_pool)
        return reroll(output, model.stage_ends[stage]).flatten(1, 2)

    def _unroll(self, tokens: Tensor, stage: int, size: Size) -> Tensor:
        from timm.models.hiera import Unroll

        return Unroll(size, (1, 1), self._schedule(self._num_poolings(stage)))(tokens)

    def _schedule(self, num_poolings: int) -> list[tuple[int, int]]:
        """The strides that are still to be pooled, or unwound at the end."""
        return [self.model.q_stride] * (len(self.blocks) - 1 - num_poolings)

    def _num_poolings(self, stage: int) -> int:
        """How often tokens have been pooled when a stage's first block is done."""
        return min(stage, self.model.q_pool)

    def _pooling(self, stage: int) -> tuple[int, int]:
        """The stride of a stage's first block."""
        return self.model.q_stride if 0 < stage <= self.model.q_pool else (1, 1)

    def norm(self, stage: int) -> nn.Module:
        return copy.deepcopy(self.model.head.norm) if stage + 1 == len(self.blocks) else super().norm(stage)
