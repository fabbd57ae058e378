"""Methods that add nothing and choose which of the backbone's own parameters are trained."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ..checks import check_count
from ..families.base import Family
from .base import Method


class Full(Method):
    """Full fine-tuning: what the stock config does, behind the wrapper."""

    trains_backbone = True

    def trained_names(self, backbone: nn.Module) -> set[str]:
        # Running statistics are trained with the rest, though by no gradient; other buffers are constants.
        norms = [(path, module) for path, module in backbone.named_modules() if isinstance(module, _NormBase)]
        statistics = {f'{path}.{name}' for path, module in norms for name, _ in module.named_buffers()}
        return statistics | {name for name, _ in backbone.named_parameters()}


class Frozen(Method):
    """Nothing in the backbone is trained and no gradient enters it."""

    @torch.no_grad()
    def run(self, family: Family, images: Tensor) -> Tensor | tuple[Tensor, ...] | list[Tensor]:
        return super().run(family, images)


class BitFit(Method):
    """Trains the biases, position bias tables included (Ben Zaken et al., arXiv 2106.10199); 201,656 for Swin-B."""

    def __init__(self, family: Family) -> None:
        super().__init__(family)
        for module in family.backbone.modules():
            # Those of timm have the names of torch's and of torchvision's.
            free = _WITH_FREE_BIAS.get(type(module).__name__)
            if free and isinstance(module, nn.LayerNorm) and module.bias is not None:
                module.__class__ = free

    def trained_names(self, backbone: nn.Module) -> set[str]:
        return {name for name, _ in backbone.named_parameters() if 'bias' in name.rpartition('.')[2]}


class _LayerNormWithFreeBias(nn.LayerNorm):
    """Adds the bias outside of the kernel: CUDA's backward fails where a bias is trained and its weight is not."""

    def forward(self, tokens: Tensor) -> Tensor:
        return F.layer_norm(tokens, self.normalized_shape, self.weight, None, self.eps) + self.bias


class _LayerNorm2dWithFreeBias(_LayerNormWithFreeBias):
    """The same over the channels of (B, C, H, W); mmpretrain's takes (B, H, W, C) as well, and is told so."""

    def forward(self, image: Tensor, data_format: str = 'channel_first') -> Tensor:
        if data_format == 'channel_last':
            return super().forward(image)
        return super().forward(image.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


_WITH_FREE_BIAS = {'LayerNorm': _LayerNormWithFreeBias, 'LayerNorm2d': _LayerNorm2dWithFreeBias}


class NormTuning(Method):
    """Trains the normalisation layers (Giannou et al., arXiv 2302.07937); 59,392 parameters for Swin-B."""

    def trained_names(self, backbone: nn.Module) -> set[str]:
        norms = (nn.LayerNorm, nn.GroupNorm, _BatchNorm)
        return {
            f'{prefix}.{name}'
            for prefix, module in backbone.named_modules()
            if isinstance(module, norms)
            for name, _ in module.named_parameters()
        }


class Partial(Method):
    """Trains the last blocks (Yosinski et al., arXiv 1411.1792); 12,601,632 parameters for Swin-B's last one.

    Args:
        num_blocks: blocks at the end of the backbone that are trained.
    """

    def __init__(self, family: Family, num_blocks: int = 1) -> None:
        super().__init__(family)
        check_count('method.num_blocks', num_blocks)
        blocks = [block.name for block in family.blocks()]
        if num_blocks > len(blocks):
            raise ValueError(f'method.num_blocks={num_blocks}, but the backbone has {len(blocks)} blocks')
        self._trained_blocks = tuple(f'{name}.' for name in blocks[-num_blocks:])

    def trained_names(self, backbone: nn.Module) -> set[str]:
        return {name for name, _ in backbone.named_parameters() if name.startswith(self._trained_blocks)}
