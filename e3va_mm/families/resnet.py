"""ResNet (arXiv 1512.03385) and its relatives in mmseg, mmdet and mmpretrain, which derive from it."""

from __future__ import annotations

from torch import nn

from .base import Block, PoolingFamily, Stage

# What detectors put into blocks that were trained without; it starts as what changes nothing.
_ADDED = ('conv_offset', 'weight_diff', 'switch', 'pre_context', 'post_context', 'offset_s', 'offset_l')


class ResNetFamily(PoolingFamily):
    """Taps: the residual branches, behind their last norm.

    A ReLU follows each addition, so the state of the highway is what is behind it plus the deltas, and may be negative.
    A stage begins with a whole block, which no gradient shall enter: the state is pooled.

    Raises:
        TypeError: it is a TridentResNet, whose branches depend on the mode.
    """

    def __init__(self, backbone: nn.Module) -> None:
        if hasattr(backbone, 'test_branch_idx'):
            name = type(backbone).__name__
            raise TypeError(f'{name} puts out other maps in training than in evaluation, in which a frozen backbone is')
        num_stages = max(backbone.out_indices) + 1
        stages = []
        for index, name in enumerate(backbone.res_layers[:num_stages]):
            norms = [_last_norm(block) for block in backbone.get_submodule(name)]
            blocks = [Block(f'{name}.{number}', (f'{name}.{number}.{norm}',)) for number, norm in enumerate(norms)]
            dims = len(backbone.get_submodule(blocks[-1].taps[0]).weight)
            norm = f'e3va_norm{index}' if index in backbone.out_indices else None
            if norm:
                backbone.add_module(norm, nn.Identity())
            stages.append(Stage(blocks, name, dims, norm))
        super().__init__(backbone, stages)
        self.has_more = num_stages < len(backbone.res_layers)

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


def _last_norm(block: nn.Module) -> str:
    return getattr(block, 'norm3_name', None) or block.norm2_name
