"""Swin Transformer (arXiv 2103.14030) as in mmseg and mmdet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .base import Block, Family, Size, Stage
from .window_attention import FusedWindowAttention

_TOOLBOXES = ('mmseg', 'mmdet', 'mmcv')


class SwinFamily(Family):
    """Taps: the output of (shifted-)window attention and the output of the MLP, before their residual additions.

    Raises:
        TypeError: a block has not these two modules.
    """

    def __init__(self, backbone: nn.Module) -> None:
        # Stages behind the last output would never get a gradient, and DDP would wait for it.
        num_stages = max(backbone.out_indices) + 1
        stages = []
        for index, (stage, dims) in enumerate(zip(backbone.stages[:num_stages], backbone.num_features)):
            blocks = [_block(f'stages.{index}.blocks.{number}', block) for number, block in enumerate(stage.blocks)]
            norm = f'norm{index}' if index in backbone.out_indices else None
            crossing = f'stages.{index}.downsample' if index + 1 < num_stages else None
            stages.append(Stage(blocks, blocks[-1].name, dims, norm, crossing))
        super().__init__(backbone, stages)
        self.has_more = num_stages < len(backbone.stages)

    def carry(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        """The stage's own patch merging."""
        return self.backbone.stages[stage].downsample(tokens, size)

    def accelerate(self) -> None:
        for module in self.backbone.modules():
            if 'forward' in vars(module):
                continue
            if _is_stock(module, 'SwinBlock') and _is_stock(module.ffn, 'FFN') and _adds_identity_only(module.ffn):
                module.forward = LeanSwinBlock(module)
            elif _is_stock(module, 'ShiftWindowMSA') and _is_stock(module.w_msa, 'WindowMSA'):
                module.forward = FusedWindowAttention(module)
            elif _is_stock(module, 'PatchMerging') and _merges_2x2(module):
                module.forward = FusedPatchMerging(module)

    def forget_prepared(self) -> None:
        for module in self.backbone.modules():
            if isinstance(vars(module).get('forward'), FusedWindowAttention):
                module.forward.forget()


def _block(name: str, block: nn.Module) -> Block:
    if not hasattr(block, 'attn') or not hasattr(getattr(block, 'ffn', None), 'layers'):
        raise TypeError(f'{name} is a {type(block).__name__} without attn and ffn.layers, the taps of a Swin block')
    # FFN.forward adds the residual itself; its `layers` are the MLP alone.
    attention, mlp = f'{name}.attn', f'{name}.ffn.layers'
    return Block(name, (attention, mlp), f'{name}.norm1', attention, mlp)


def _is_stock(module: nn.Module, name: str) -> bool:
    """Whether it is of exactly the toolboxes' class; a subclass may compute something else."""
    return type(module).__name__ == name and type(module).__module__.partition('.')[0] in _TOOLBOXES


def _merges_2x2(merging: nn.Module) -> bool:
    sampler, padding = merging.sampler, getattr(merging.adap_padding, 'padding', None)
    geometry = (sampler.kernel_size, sampler.stride, sampler.dilation, padding)
    return geometry == ((2, 2), (2, 2), (1, 1), 'corner') and merging.norm is not None


def _adds_identity_only(ffn: nn.Module) -> bool:
    return ffn.add_identity and isinstance(getattr(ffn, 'gamma2', nn.Identity()), nn.Identity)


class LeanSwinBlock:
    """What the stock block computes in eval mode, without what does nothing then and takes the processor's time."""

    def __init__(self, block: nn.Module) -> None:
        self.block = block

    def __call__(self, x: Tensor, hw_shape: Size) -> Tensor:
        """x: tokens (B, H * W, C) -> the same; gradient flows through."""
        block = self.block
        x = x + block.attn(block.norm1(x), hw_shape)
        return x + block.ffn.layers(block.norm2(x))


class FusedPatchMerging:
    """What the stock module computes with ``nn.Unfold``, which runs a kernel an image and transposes twice."""

    def __init__(self, merging: nn.Module) -> None:
        self.merging = merging

    def __call__(self, x: Tensor, input_size: Size) -> tuple[Tensor, Size]:
        """x: tokens (B, H * W, C) -> (B, L, C') and the size that L stands for; gradient flows through."""
        height, width = input_size
        grid = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, width % 2, 0, height % 2))
        patches = grid.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).permute(0, 1, 3, 5, 2, 4)
        rows, columns = patches.shape[1:3]
        patches = patches.reshape(len(x), rows * columns, -1)
        return self.merging.reduction(self.merging.norm(patches)), (rows, columns)
