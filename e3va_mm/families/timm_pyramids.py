"""timm's backbones in stages of increasing stride: Swin, PVT, ConvNeXt, EfficientNet and MobileNet."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from .base import Block, PoolingFamily, Size, Stage
from .timm_base import TIMMFamily, pad_to, staged, uncalled_qkv


class SwinFamily(TIMMFamily):
    """Swin and SwinV2 (arXiv 2103.14030, 2111.09883); windows as at the pre-training size, shift masks per image."""

    layout = 'NHWC'
    model_args = dict(strict_img_size=False)

    def __init__(self, backbone: nn.Module, out_indices: tuple[int, ...]) -> None:
        super().__init__(backbone, out_indices)
        self.uncalled = uncalled_qkv(backbone.model.layers[0].blocks[0].attn)

    def describe(self, model: nn.Module) -> list[Stage]:
        return staged(model, 'layers')

    def prepare(self, images: Tensor) -> Tensor:
        return pad_to(images, self.backbone.model.patch_embed.patch_size[0])

    def carry(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        return self._from_map(self.backbone.model.layers[stage + 1].downsample(tokens.unflatten(1, size)))

    def new_norm(self, model: nn.Module, stage: int) -> nn.Module:
        return copy.deepcopy(model.norm) if stage + 1 == len(model.layers) else super().new_norm(model, stage)


class PVTFamily(TIMMFamily):
    """Pyramid Vision Transformer v2 (arXiv 2106.13797); each stage ends in a norm that the next one starts from."""

    unused = ('stages.3.norm', 'head')

    def describe(self, model: nn.Module) -> list[Stage]:
        return staged(model, 'stages')

    def maps(self, images: Tensor) -> list[Tensor]:
        # timm's features come out of the stages' own norms; ours, of their own weights, take what these read.
        heard: list[Tensor] = []
        hooks = [
            self.backbone.model.stages[index].norm.register_forward_pre_hook(lambda norm, args: heard.append(args[0]))
            for index in self.indices
        ]
        try:
            features = super().maps(images)
        finally:
            for hook in hooks:
                hook.remove()
        return [tokens.transpose(1, 2).view_as(feature) for tokens, feature in zip(heard, features)]

    def carry(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        norm, downsample = self.backbone.model.stages[stage].norm, self.backbone.model.stages[stage + 1].downsample
        # Not by a call, which :meth:`maps` would take for the frozen pass.
        following = downsample(norm.forward(tokens).transpose(1, 2).unflatten(2, size))
        return following.flatten(1, 2), tuple(following.shape[1:3])

    def new_norm(self, model: nn.Module, stage: int) -> nn.Module:
        return copy.deepcopy(model.stages[stage].norm)


class ConvNeXtFamily(TIMMFamily):
    """ConvNeXt and V2 (arXiv 2201.03545, 2301.00808); a tap is a whole block's branch."""

    layout = 'NCHW'
    unused = ('norm_pre', 'head')

    def describe(self, model: nn.Module) -> list[Stage]:
        return staged(model, 'stages', lambda name, block: Block(name, (f'{name}.drop_path',)))

    def carry(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        image = tokens.transpose(1, 2).unflatten(2, size)
        return self._from_map(self.backbone.model.stages[stage + 1].downsample(image))


class InvertedResidualFamily(PoolingFamily, TIMMFamily):
    """EfficientNet (arXiv 1905.11946) and MobileNet V2 and V3 (arXiv 1801.04381, 1905.02244).

    A stage is a group of timm's ``blocks`` from stride 4 on; the last group of each stride has the output. A group
    begins with a block without skip connection, which belongs to the transition.
    """

    unused = ('conv_head', 'norm_head', 'bn2', 'classifier')

    def describe(self, model: nn.Module) -> list[Stage]:
        stages = []
        for number in range(self._ends(model)[0], len(model.blocks)):
            group = model.blocks[number]
            skips = [block.has_skip for block in group]
            if skips != sorted(skips):
                raise ValueError(f'blocks.{number} has a block without skip connection behind one with it')
            names = [f'model.blocks.{number}.{place}' for place, skip in enumerate(skips) if skip]
            blocks = [Block(name, (f'{name}.drop_path',)) for name in names]
            stages.append(
                Stage(blocks, f'model.blocks.{number}', group[-1].feature_info('bottleneck')['num_chs'], None)
            )
        return stages

    @staticmethod
    def _ends(model: nn.Module) -> list[int]:
        """The number of timm's blocks up to each stride, from 2 on."""
        return [info['stage'] for info in model.feature_info]

    def outputs(self, model: nn.Module) -> list[int]:
        first, *ends = self._ends(model)
        return [end - 1 - first for end in ends]

    def feature_index(self, model: nn.Module, index: int) -> int:
        return index + 1  # stride 2 has no map here

    def convert(self, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        if '_conv_stem.weight' not in weights:
            return weights
        # The other common PyTorch port (_blocks.N._expand_conv, ...) registers the same layers in the same order.
        return dict(zip(model.state_dict(), weights.values()))
