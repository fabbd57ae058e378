"""mmseg's ``MixVisionTransformer`` (SegFormer, arXiv 2105.15203)."""

from __future__ import annotations

import copy

from torch import Tensor, nn

from .base import Block, Family, Size, Stage


class MiTFamily(Family):
    """A stage's norm has the output and leads to the next stage.

    As an output norm it is trained; the frozen pass, and the state's way to the next stage, take what it was before, of
    which a copy is kept.
    """

    uncalled = ('out_proj',)

    def __init__(self, backbone: nn.Module) -> None:
        num_stages = max(backbone.out_indices) + 1
        stages = []
        for index, (_, blocks, norm) in enumerate(backbone.layers[:num_stages]):
            names = [f'layers.{index}.1.{number}' for number in range(len(blocks))]
            branches = [(f'{name}.attn.dropout_layer', f'{name}.ffn.dropout_layer') for name in names]
            sites = [Block(name, taps) for name, taps in zip(names, branches)]
            output = f'layers.{index}.2' if index in backbone.out_indices else None
            crossing = f'layers.{index + 1}.0' if index + 1 < num_stages else None
            stages.append(Stage(sites, names[-1], norm.normalized_shape[0], output, crossing))
        super().__init__(backbone, stages)
        self.has_more = num_stages < len(backbone.layers)
        self.remember()

    def remember(self) -> None:
        self._published = [
            copy.deepcopy(self.backbone.layers[index][2]).requires_grad_(False) for index in range(len(self.stages))
        ]

    def _norm(self, stage: int) -> nn.Module:
        # Not among the backbone's modules, so that no state dict has it; it follows them from device to device.
        return self._published[stage].to(self.backbone.layers[stage][2].weight)

    def replacements(self) -> dict[str, nn.Module]:
        return {f'layers.{index}.2': self._norm(index) for index in range(len(self.stages))}

    def published_norm(self, stage: Stage) -> nn.Module:
        return self._norm(self.stages.index(stage))

    def carry(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        normed = self._norm(stage)(tokens.to(self._norm(stage).weight.dtype))
        return self.backbone.layers[stage + 1][0](normed.transpose(1, 2).unflatten(2, size))
