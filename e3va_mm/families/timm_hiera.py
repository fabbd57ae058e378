"""timm's Hiera (arXiv 2306.00989), also with absolute window position embeddings (arXiv 2311.05613).

The first block of a stage pools: its residual branch is ``pool(proj(norm1(x)))``, and its attention pools the queries
of the unpooled tokens. So the frozen stream enters a stage as it left the one before, and the highway's state goes
through the residual branch alone, with its frozen weights: the highway's formula starts from there.

Hiera keeps tokens in an order in which windows are contiguous; its modules for that are made for one image size, and
made anew for each size here.
"""

from __future__ import annotations

import copy
import itertools
import types

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Size, Stage
from .timm_base import TIMMFamily, pad_to, transformer_block


class HieraFamily(TIMMFamily):
    """Stages end where timm's do; images are padded to whole mask units."""

    layout = 'NLC'
    unused = ('head',)
    exports_fused = open_sizes = False

    def __init__(self, backbone: nn.Module, out_indices: tuple[int, ...]) -> None:
        super().__init__(backbone, out_indices)
        backbone.model._pos_embed = types.MethodType(_position, backbone.model)

    def describe(self, model: nn.Module) -> list[Stage]:
        starts = [0, *(end + 1 for end in model.stage_ends)]
        stages = []
        for index, (start, stop) in enumerate(itertools.pairwise(starts)):
            blocks = [
                transformer_block(f'model.blocks.{number}', model.blocks[number], model.blocks[number].do_expand)
                for number in range(start, stop)
            ]
            stages.append(Stage(blocks, blocks[-1].name, model.feature_info[index]['num_chs'], None))
        return stages

    def enters_graph(self) -> bool:
        return False

    def prepare(self, images: Tensor) -> Tensor:
        from timm.models.hiera import Reroll, Unroll

        model = self.backbone.model
        stride, unit = model.patch_stride[0], model.mask_unit_size[0]
        images = pad_to(images, stride * unit)
        size = [length // stride for length in images.shape[2:]]
        if list(model.unroll.size) != size:
            schedule = [model.q_stride] * (len(model.stage_ends) - 1)
            model.unroll = Unroll(size, (1, 1), schedule)
            model.reroll = Reroll(size, (1, 1), schedule, model.stage_ends, model.q_pool)
            model.mask_spatial_shape = [length // unit for length in size]
        return images

    def tap(self, stage: int, output: Tensor, grid: Size | None) -> tuple[Tensor, Size | None]:
        return self.level(stage, (), output, grid)

    def level(self, stage: int, args: tuple, output: Tensor, grid: Size | None) -> tuple[Tensor, Size]:
        """From Hiera's order to rows."""
        model = self.backbone.model
        image = model.reroll(output, model.stage_ends[stage])
        return image.flatten(1, 2), tuple(image.shape[1:3])

    def carry(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        model = self.backbone.model
        block = model.blocks[model.stage_ends[stage] + 1]
        stride = model.q_stride if stage < model.q_pool else (1, 1)
        if block.proj is not None:
            pooled = F.max_pool2d(_image(block.proj(block.norm1(tokens)), size), stride)
        else:
            image = _image(tokens, size)
            pooled = torch.cat([F.max_pool2d(image, stride), F.avg_pool2d(image, stride)], dim=1)
        return pooled.flatten(2).transpose(1, 2), tuple(pooled.shape[2:])

    def new_norm(self, model: nn.Module, stage: int) -> nn.Module:
        is_last = stage + 1 == len(model.stage_ends)
        return copy.deepcopy(model.head.norm) if is_last else super().new_norm(model, stage)


def _image(tokens: Tensor, size: Size) -> Tensor:
    return tokens.transpose(1, 2).unflatten(2, size)


def _position(model: nn.Module, tokens: Tensor) -> Tensor:
    """In place of the model's ``_pos_embed``, whose table for one image size is resampled here."""
    from timm.layers import resample_abs_pos_embed_nhwc

    if model.pos_embed_win is not None:
        return type(model)._pos_embed(model, tokens)
    table = model.pos_embed.unflatten(1, model.tokens_spatial_shape)
    return tokens + resample_abs_pos_embed_nhwc(table, model.unroll.size).flatten(1, 2)
