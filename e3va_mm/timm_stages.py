"""timm's families in stages, see :class:`~e3va_mm.stages.Stages`; Hiera has a file of its own.

=====================  ====================================================  =======================================
family                 taps                                                  from stage to stage, on the highway
=====================  ====================================================  =======================================
Swin, SwinV2           attention and MLP, V2's post-norms included           own patch merging, frozen
ViT, EVA, SAM          attention and MLP, LayerScale included; patch tokens  as it is: one resolution, four depths
ConvNeXt               each block, LayerScale included                       own downsampling, frozen
Hiera                  attention and MLP                                     own norm, projection and pooling, frozen
PVTv2                  attention and MLP                                     own norm and patch embedding, frozen
EfficientNet,          each block with a skip connection                     pooling and zero channels, as in ResNet's
MobileNet V2, V3                                                             option A: their transitions are whole
                                                                             blocks, which no gradient shall enter
=====================  ====================================================  =======================================
"""

from __future__ import annotations

import copy
import itertools
import sys

import torch.nn.functional as F
from torch import Tensor, nn

from .stages import Size, Stages, from_nchw, pool_and_pad, to_nchw


class TIMMStages(Stages):
    """What timm's families have in common.

    Args:
        model: the timm model.
        stages: its stages, each with ``blocks``, where it has such.
    """

    # What timm's constructor needs for images of any size.
    model_args: dict = {}
    # Modules behind the last stage, which no map needs.
    unused: tuple[str, ...] = ('norm', 'head')

    def __init__(self, model: nn.Module, stages: nn.ModuleList | tuple = ()) -> None:
        super().__init__(model)
        self.blocks = [list(stage.blocks) for stage in stages]
        self.embed_dims = [info['num_chs'] for info in model.feature_info]
        self.levels = list(range(len(self.blocks)))

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights in the names of a published file -> in timm's; by timm's own converter, where the family has one."""
        convert = getattr(sys.modules[type(self.model).__module__], 'checkpoint_filter_fn', None)
        return convert(weights, self.model) if convert else weights


class SwinStages(TIMMStages):
    """Swin and SwinV2 (arXiv 2103.14030, 2111.09883); windows as at the pre-training size, shift masks per image."""

    model_args = dict(strict_img_size=False)

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, model.layers)

    @property
    def bypassed(self) -> tuple[str, ...]:
        return _bypassed(self.blocks[0][0].attn)

    def embed(self, images: Tensor) -> tuple[Tensor, Size]:
        return _from_nhwc(self.model.patch_embed(pad_to(images, self.model.patch_embed.patch_size[0])))

    def advance(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        return _from_nhwc(self.model.layers[stage + 1].downsample(tokens.unflatten(1, size)))

    def run_block(self, block: nn.Module, tokens: Tensor, size: Size) -> Tensor:
        return block(tokens.unflatten(1, size)).flatten(1, 2)

    def norm(self, stage: int) -> nn.Module:
        return copy.deepcopy(self.model.norm) if stage + 1 == len(self.blocks) else super().norm(stage)


class PVTStages(TIMMStages):
    """Pyramid Vision Transformer v2 (arXiv 2106.13797); each stage ends in a norm that the next one starts from."""

    unused = ('stages.3.norm', 'head')

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, model.stages)

    def embed(self, images: Tensor) -> tuple[Tensor, Size]:
        return _from_nhwc(self.model.patch_embed(images))

    def advance(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        normed = self.model.stages[stage].norm(tokens)
        return _from_nhwc(self.model.stages[stage + 1].downsample(to_nchw(normed, size)))

    def run_block(self, block: nn.Module, tokens: Tensor, size: Size) -> Tensor:
        return block(tokens, size)

    def norm(self, stage: int) -> nn.Module:
        return copy.deepcopy(self.model.stages[stage].norm)


class ConvolutionStages(TIMMStages):
    """What families whose blocks read (B, C, H, W), with one residual branch each, have in common."""

    def run_block(self, block: nn.Module, tokens: Tensor, size: Size) -> Tensor:
        return from_nchw(block(to_nchw(tokens, size)))[0]

    def branches(self, block: nn.Module) -> list[nn.Module]:
        return [block.drop_path]

    def arrange(self, branch: nn.Module, output: Tensor, size: Size) -> Tensor:
        return from_nchw(output)[0]


class ConvNeXtStages(ConvolutionStages):
    """ConvNeXt and V2 (arXiv 2201.03545, 2301.00808)."""

    unused = ('norm_pre', 'head')

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, model.stages)

    def embed(self, images: Tensor) -> tuple[Tensor, Size]:
        return from_nchw(self.model.stages[0].downsample(self.model.stem(images)))

    def advance(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        return from_nchw(self.model.stages[stage + 1].downsample(to_nchw(tokens, size)))


class InvertedResidualStages(ConvolutionStages):
    """EfficientNet (arXiv 1905.11946) and MobileNet V2 and V3 (arXiv 1801.04381, 1905.02244).

    A stage is a group of timm's ``blocks`` from stride 4 on. It begins with a block without skip connection, which
    belongs to the transition; the last group of each stride has the output.
    """

    unused = ('conv_head', 'norm_head', 'bn2', 'classifier')

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        ends = {info['reduction']: info['stage'] for info in model.feature_info}
        self.stem, self.groups = model.blocks[: ends[2]], list(model.blocks[ends[2] :])
        self.entrances = [[block for block in group if not block.has_skip] for group in self.groups]
        self.blocks = [[block for block in group if block.has_skip] for group in self.groups]
        for number, group in enumerate(self.groups):
            if [*self.entrances[number], *self.blocks[number]] != list(group):
                raise ValueError(f'blocks.{number + ends[2]} has a block without skip connection behind one with it')
        self.embed_dims = [group[-1].feature_info('bottleneck')['num_chs'] for group in self.groups]
        self.levels = [stage - 1 - ends[2] for reduction, stage in ends.items() if reduction > 2]

    def embed(self, images: Tensor) -> tuple[Tensor, Size]:
        return self._enter(0, self.stem(self.model.bn1(self.model.conv_stem(images))))

    def advance(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        return self._enter(stage + 1, to_nchw(tokens, size))

    def _enter(self, stage: int, features: Tensor) -> tuple[Tensor, Size]:
        for block in self.entrances[stage]:
            features = block(features)
        return from_nchw(features)

    def carry(self, stage: int, tokens: Tensor, size: Size, next_size: Size) -> Tensor:
        return pool_and_pad(tokens, size, next_size, self.embed_dims[stage + 1])

    def convert(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        if '_conv_stem.weight' not in weights:
            return weights
        # The other common PyTorch port (_blocks.N._expand_conv, ...) registers the same layers in the same order.
        return dict(zip(self.model.state_dict(), weights.values()))


class ViTStages(TIMMStages):
    """Plain vision transformers (arXiv 2010.11929): AugReg, DINOv2 with registers, CLIP, ...

    Four stages of equal depth at one resolution. Images are padded to whole patches; if the patch size is no power of
    two (14), they are resized first, so that a patch covers the next power of two: heads expect such strides.
    """

    model_args = dict(dynamic_img_size=True)
    unused = ('norm', 'fc_norm', 'attn_pool', 'head')
    _NUM_STAGES = 4

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        depth = len(model.blocks)
        cuts = [round(depth * number / self._NUM_STAGES) for number in range(self._NUM_STAGES + 1)]
        self.blocks = [list(model.blocks[start:stop]) for start, stop in itertools.pairwise(cuts)]
        self.embed_dims = [model.embed_dim] * self._NUM_STAGES
        self.levels = list(range(self._NUM_STAGES))
        self.num_prefix = getattr(model, 'num_prefix_tokens', 0)

    def embed(self, images: Tensor) -> tuple[Tensor, Size]:
        grid = self.model.patch_embed(self._whole_patches(images))
        return self._position(grid), tuple(grid.shape[1:3])

    def _whole_patches(self, images: Tensor) -> Tensor:
        patch = self.model.patch_embed.patch_size[0]
        stride = 1 << (patch - 1).bit_length()
        images = pad_to(images, stride)
        if stride == patch:
            return images
        size = [length // stride * patch for length in images.shape[2:]]
        return F.interpolate(images, size=size, mode='bilinear', align_corners=False)

    def _position(self, grid: Tensor) -> Tensor:
        """Patches (B, H, W, C) -> tokens with prefix and position."""
        return self.model.norm_pre(self.model._pos_embed(grid))

    def advance(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        return tokens, size

    def run_block(self, block: nn.Module, tokens: Tensor, size: Size) -> Tensor:
        return block(tokens)

    def norm(self, stage: int) -> nn.Module:
        found = [getattr(self.model, name, None) for name in ('norm', 'fc_norm')]
        norm = next((norm for norm in found if isinstance(norm, nn.LayerNorm)), None)
        return copy.deepcopy(norm) if norm is not None else super().norm(stage)


class EvaStages(ViTStages):
    """EVA, EVA-02 and DINOv3 (arXiv 2303.11331, 2508.10104): rotary position embeddings, made for each image size."""

    @property
    def bypassed(self) -> tuple[str, ...]:
        return _bypassed(self.blocks[0][0].attn)

    def _position(self, grid: Tensor) -> Tensor:
        return self.model.norm_pre(self.model._pos_embed(grid)[0])

    def run_block(self, block: nn.Module, tokens: Tensor, size: Size) -> Tensor:
        return block(tokens, rope=None if self.model.rope is None else self._rope(block, size))

    def _rope(self, block: nn.Module, size: Size) -> Tensor:
        rope = self.model.rope.get_embed(shape=size)
        return rope[list(self.model.blocks).index(block)] if getattr(self.model, 'rope_mixed', False) else rope


class SAMStages(ViTStages):
    """The image encoder of Segment Anything (arXiv 2304.02643), without its neck; tokens in windows but for four
    blocks."""

    model_args = {}
    unused = ('neck', 'head')

    def _position(self, grid: Tensor) -> Tensor:
        if self.model.pos_embed is not None:
            grid = grid + resample_nhwc(self.model.pos_embed, grid.shape[1:3])
        return self.model.norm_pre(grid).flatten(1, 2)

    def run_block(self, block: nn.Module, tokens: Tensor, size: Size) -> Tensor:
        return block(tokens.unflatten(1, size)).flatten(1, 2)

    def arrange(self, branch: nn.Module, output: Tensor, size: Size) -> Tensor:
        if output.ndim == 3:
            return output
        window, (height, width) = output.shape[1], size
        if output.shape[1:3] == (height, width):
            return output.flatten(1, 2)
        rows, columns = -(-height // window), -(-width // window)
        grid = output.unflatten(0, (-1, rows, columns)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return grid[:, :height, :width].flatten(1, 2)

    def norm(self, stage: int) -> nn.Module:
        return TIMMStages.norm(self, stage)


def _bypassed(attention: nn.Module) -> tuple[str, ...]:
    adds_bias_itself = getattr(attention, 'q_bias', None) is not None and not attention.qkv_bias_separate
    return ('qkv',) if adds_bias_itself else ()


def pad_to(images: Tensor, multiple: int) -> Tensor:
    """Zeros at the bottom and on the right, to multiples in height and width."""
    height, width = (-length % multiple for length in images.shape[2:])
    return F.pad(images, (0, width, 0, height))


def _from_nhwc(features: Tensor) -> tuple[Tensor, Size]:
    return features.flatten(1, 2), tuple(features.shape[1:3])


def resample_nhwc(table: Tensor, size: Size) -> Tensor:
    from timm.layers import resample_abs_pos_embed_nhwc

    return resample_abs_pos_embed_nhwc(table, list(size))
