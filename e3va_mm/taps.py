"""Where a backbone family keeps its tap points and stage transitions: the one place to teach it a new family.

A family is a class with the interface of :class:`SwinTaps` and an entry in :data:`FAMILIES`. It calls the stock
modules of the wrapped backbone and copies none of their code.
"""

from __future__ import annotations

from torch import Tensor, nn

Size = tuple[int, int]


class SwinTaps:
    """Swin Transformer (arXiv 2103.14030) as in mmseg and mmdet.

    Taps: the output of (shifted-)window attention and the output of the MLP, both before their residual addition.

    Args:
        backbone: the stock module.
    """

    def __init__(self, backbone: nn.Module) -> None:
        self.backbone = backbone
        self.out_indices = tuple(backbone.out_indices)
        # Stages behind the last output would never get a gradient, and DDP would wait for it.
        self.num_stages = max(self.out_indices) + 1
        self.embed_dims = list(backbone.num_features[: self.num_stages])
        self.num_taps = [2 * len(stage.blocks) for stage in backbone.stages[: self.num_stages]]
        self.norm_names = [f'norm{index}' for index in self.out_indices]

    def embed(self, images: Tensor) -> tuple[Tensor, Size]:
        """Images (B, 3, H, W) -> tokens (B, L, C) and their height and width."""
        tokens, size = self.backbone.patch_embed(images)
        if self.backbone.use_abs_pos_embed:
            tokens = tokens + self.backbone.absolute_pos_embed
        return self.backbone.drop_after_pos(tokens), size

    def run_stage(self, index: int, tokens: Tensor, size: Size) -> tuple[Tensor, list[Tensor]]:
        """Tokens at a stage's start -> tokens before its downsampling, and its taps in the order of execution."""
        taps = []
        for block in self.backbone.stages[index].blocks:
            attended = block.attn(block.norm1(tokens), size)
            tokens = tokens + attended
            # FFN.forward adds the residual itself; its `layers` are the MLP alone.
            transformed = block.ffn.layers(block.norm2(tokens))
            tokens = tokens + transformed
            taps += [attended, transformed]
        return tokens, taps

    def downsample(self, index: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        """The stage's own patch merging."""
        return self.backbone.stages[index].downsample(tokens, size)


FAMILIES = {
    ('mmseg', 'SwinTransformer'): SwinTaps,
    ('mmdet', 'SwinTransformer'): SwinTaps,
}


def build_taps(backbone: nn.Module) -> SwinTaps:
    """The family of ``backbone``, subclasses included.

    Raises:
        TypeError: no family is known; the message lists the supported ones.
    """
    for cls in type(backbone).__mro__:
        family = FAMILIES.get((cls.__module__.partition('.')[0], cls.__name__))
        if family:
            return family(backbone)
    raise TypeError(f'unsupported backbone.type {type(backbone).__name__!r}; supported are {supported_backbones()}')


def supported_backbones() -> str:
    return ', '.join(f'{package}.{name}' for package, name in FAMILIES)
