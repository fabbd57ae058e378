"""The one table of families; ``docs/backbones.md`` shows it."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from .base import Family
from .discovered import DiscoveredFamily
from .mit import MiTFamily
from .resnet import ResNetFamily
from .swin import SwinFamily
from .timm_base import TIMMFamily
from .timm_hiera import HieraFamily
from .timm_pyramids import ConvNeXtFamily, InvertedResidualFamily, PVTFamily
from .timm_pyramids import SwinFamily as TIMMSwinFamily
from .timm_vits import EvaFamily, SAMFamily, ViTFamily


class Row(NamedTuple):
    """A family, and what is said of it."""

    family: type[Family]
    keys: tuple[str, ...]  # ``package.Class`` of a registered backbone, or ``timm.MODULE`` by the file of timm's model
    title: str
    example: str
    taps: str
    crossing: str  # how the highway's state gets to the next stage
    strides: str = '4, 8, 16, 32'


# fmt: off
TABLE = [
    Row(SwinFamily, ('mmseg.SwinTransformer', 'mmdet.SwinTransformer'), 'mm Swin', "type='SwinTransformer'",
        'attention, MLP', 'own patch merging'),
    Row(MiTFamily, ('mmseg.MixVisionTransformer',), 'mmseg MiT', "type='mmseg.MixVisionTransformer'",
        'attention, MLP', 'own norm, as it was before training, and patch embedding'),
    Row(ResNetFamily, ('mmseg.ResNet', 'mmdet.ResNet', 'mmpretrain.ResNet'),
        'ResNet, ResNeXt, ResNeSt, Res2Net, RegNet, DetectoRS, and V1c, V1d', "type='ResNetV1c'",
        "a bottleneck's last convolution, what it reads; a basic block's branch", 'pooling, zeros for new channels'),
    Row(TIMMSwinFamily, ('timm.swin_transformer', 'timm.swin_transformer_v2'), 'timm Swin, SwinV2',
        'swinv2_base_window12_192.ms_in22k', "attention, MLP, V2's post-norms included", 'own patch merging'),
    Row(ViTFamily, ('timm.vision_transformer', 'timm.deit'), 'timm ViT: AugReg, DeiT, DINOv2, CLIP',
        'vit_large_patch14_dinov2.lvd142m', 'attention, MLP; patch tokens only', 'as it is', 'four at 16'),
    Row(EvaFamily, ('timm.eva',), 'timm EVA: EVA-02, DINOv3', 'vit_large_patch16_dinov3.lvd1689m',
        'attention, MLP; patch tokens only', 'as it is', 'four at 16'),
    Row(SAMFamily, ('timm.vision_transformer_sam',), 'timm SAM', 'samvit_base_patch16',
        'attention, MLP, windows put back in place', 'as it is', 'four at 16'),
    Row(ConvNeXtFamily, ('timm.convnext',), 'timm ConvNeXt, V2', 'convnext_base.fb_in22k', 'each block',
        'own downsampling'),
    Row(HieraFamily, ('timm.hiera',), 'timm Hiera', 'hiera_base_224.mae', 'attention, MLP',
        "own norm, projection and pooling: the residual branch of a stage's first block"),
    Row(PVTFamily, ('timm.pvt_v2',), 'timm PVTv2', 'pvt_v2_b2', 'attention, MLP', 'own norm and patch embedding'),
    Row(InvertedResidualFamily, ('timm.efficientnet', 'timm.mobilenetv3'), 'timm EfficientNet, MobileNetV2, V3',
        'tf_efficientnet_lite0', 'each block with a skip connection', 'pooling, zeros for new channels'),
    Row(DiscoveredFamily, (), 'any other module that returns maps', "type='mmdet.HRNet'",
        'blocks that lead to each map, found by running it on noise', 'pooling, zeros for new channels', 'its own'),
]
# fmt: on
FAMILIES: dict[str, type[Family]] = {key: row.family for row in TABLE for key in row.keys}


def find_family(backbone: nn.Module) -> Family:
    """The family of ``backbone``, subclasses included, or one that is found by running it once.

    Raises:
        TypeError: it returns no maps, or a subclass lacks what its family listens to; the message names it.
    """
    if isinstance(getattr(backbone, 'family', None), TIMMFamily):
        return backbone.family
    for cls in type(backbone).__mro__:
        family = FAMILIES.get(f'{cls.__module__.partition(".")[0]}.{cls.__name__}')
        if family:
            return family(backbone)
    return DiscoveredFamily(backbone)


def find_timm_family(module: str) -> type[TIMMFamily] | None:
    """The family of timm's models in the file ``module``."""
    return FAMILIES.get(f'timm.{module}')


def timm_modules() -> list[str]:
    return sorted(key.removeprefix('timm.') for key in FAMILIES if key.startswith('timm.'))
