"""ResNet (arXiv 1512.03385) and its relatives in mmseg, mmdet and mmpretrain, which derive from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .base import Block, PoolingFamily, Stage

# What detectors put into blocks that were trained without; it starts as what changes nothing.
_ADDED = ('conv_offset', 'weight_diff', 'switch', 'pre_context', 'post_context', 'offset_s', 'offset_l')


class ResNetFamily(PoolingFamily):
    """Taps: of a bottleneck, what its last convolution reads; of a basic block, its residual branch.

    A bottleneck's last convolution is a matrix a pixel, so that what it reads tells as much as what it puts out, in a
    quarter of the channels.
    A ReLU follows each addition, so the state of the highway is what is behind it plus the deltas, and may be negative.
    A stage begins with a whole block, which no gradient shall enter: the state is pooled.

    Raises:
        TypeError: it is a TridentResNet, whose branches depend on the mode.
    """

    follows_autocast = True
    _format = torch.contiguous_format

    def __init__(self, backbone: nn.Module) -> None:
        if hasattr(backbone, 'test_branch_idx'):
            name = type(backbone).__name__
            raise TypeError(f'{name} puts out other maps in training than in evaluation, in which a frozen backbone is')
        num_stages = max(backbone.out_indices) + 1
        stages = []
        for index, name in enumerate(backbone.res_layers[:num_stages]):
            layer = backbone.get_submodule(name)
            blocks = [_block(f'{name}.{number}', block) for number, block in enumerate(layer)]
            norm = self.add_output(backbone, index) if index in backbone.out_indices else None
            dims, tap_dims = _dims(layer[-1])
            stages.append(Stage(blocks, name, dims, norm, tap_dims=tap_dims))
        super().__init__(backbone, stages)
        self.has_more = num_stages < len(backbone.res_layers)

    def accelerate(self) -> None:
        """Keeps maps with their channels last in memory: half-precision convolutions, and adapters, want them so."""
        # mmcv's own operators refuse such maps.
        layers = [module for module in self.backbone.modules() if isinstance(module, nn.Conv2d)]
        plain = all(type(each).__module__.startswith('torch.') for each in self.backbone.modules() if _is_leaf(each))
        self._format = torch.channels_last if plain else torch.contiguous_format
        for layer in layers:
            layer.to(memory_format=self._format)

    def run(self, images: Tensor) -> Tensor | tuple | list:
        return super().run(images.contiguous(memory_format=self._format))

    def added(self) -> set[str]:
        plugins = [
            f'{path}.{name}'
            for path, block in self.backbone.named_modules()
            for key, names in vars(block).items()
            if key.endswith('_plugin_names')
            for name in names
        ]
        names = [name for name, _ in self.backbone.named_parameters()]
        return {name for name in names if name.startswith(tuple(plugins)) or set(_ADDED) & set(name.split('.'))}


def _block(name: str, block: nn.Module) -> Block:
    is_bottleneck = hasattr(block, 'conv3')
    return Block(name, (f'{name}.conv3' if is_bottleneck else f'{name}.{block.norm2_name}',), taps_inputs=is_bottleneck)


def _dims(block: nn.Module) -> tuple[int, int]:
    """Channels of a block's output and of its tap."""
    if hasattr(block, 'conv3'):
        return block.conv3.out_channels, block.conv3.in_channels
    return block.conv2.out_channels, block.conv2.out_channels


def _is_leaf(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
