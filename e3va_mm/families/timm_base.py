"""What timm's families have in common, behind :class:`~e3va_mm.backbones.timm_features.TIMMFeatures`."""

from __future__ import annotations

import contextlib
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor, nn

from ..highway.tap_record import in_trace
from .base import Block, Family, Stage


class TIMMFamily(Family, ABC):
    """A family of timm's, whose model is ``backbone.model``.

    Args:
        backbone: a TIMMFeatures, with the model but without output norms yet.
        out_indices: which of the maps it returns, by increasing stride or depth.

    Raises:
        ValueError: ``out_indices`` has no such map.
    """

    # What timm's constructor needs for images of any size.
    model_args: dict = {}
    # Modules behind the last stage, which no map needs.
    unused: tuple[str, ...] = ('norm', 'head')
    # Whether fused attention is called with four dimensions, the only ones that ONNX knows it with.
    exports_fused = True

    def __init__(self, backbone: nn.Module, out_indices: tuple[int, ...]) -> None:
        stages, outputs = self.describe(backbone.model), self.outputs(backbone.model)
        if not out_indices or not set(out_indices) <= set(range(len(outputs))):
            raise ValueError(f'out_indices={out_indices!r}, but {backbone.model_name} has maps 0 to {len(outputs) - 1}')
        norms = {outputs[index]: f'norm{index}' for index in sorted(out_indices)}
        stages = [stage._replace(norm=norms.get(index)) for index, stage in enumerate(stages[: max(norms) + 1])]
        stages[-1] = stages[-1]._replace(crossing=None)
        super().__init__(backbone, stages)
        self.indices = [self.feature_index(backbone.model, index) for index in sorted(out_indices)]
        self.new_norms = {name: self.new_norm(backbone.model, index) for index, name in norms.items()}

    @abstractmethod
    def describe(self, model: nn.Module) -> list[Stage]:
        """All stages of a model, without output norms."""

    def outputs(self, model: nn.Module) -> list[int]:
        """The stages that have a map."""
        return list(range(len(self.describe(model))))

    def feature_index(self, model: nn.Module, index: int) -> int:
        """What timm's ``forward_intermediates`` calls the map ``index``."""
        return index

    def new_norm(self, model: nn.Module, stage: int) -> nn.Module:
        """An output norm (over the last dimension) of a stage, with the weights of timm's where it has one."""
        return nn.LayerNorm(self.describe(model)[stage].embed_dims, eps=1e-6)

    def prepare(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) -> what the model can take; may set the model up for their size."""
        return images

    def maps(self, images: Tensor) -> list[Tensor]:
        """Prepared images -> (B, C_s, H_s, W_s) of each stage with an output, before its norm; timm's own forward."""
        model = self.backbone.model
        with contextlib.nullcontext() if self.exports_fused or not in_trace() else plain_attention(model):
            return model.forward_intermediates(images, indices=self.indices, stop_early=True, intermediates_only=True)

    def convert(self, model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights in the names of a published file -> in timm's; by timm's own converter, where the family has one."""
        convert = getattr(sys.modules[type(model).__module__], 'checkpoint_filter_fn', None)
        return convert(weights, model) if convert else weights


def transformer_block(name: str, block: nn.Module, pools: bool = False) -> Block:
    """A block of timm's with two residual branches.

    Raises:
        ValueError: it has not the two.
    """
    if not hasattr(block, 'drop_path1'):
        raise ValueError(f'{type(block).__name__} has not the two residual branches that blocks of its family have')
    parts = {child for child, _ in block.named_children()}
    norm1, attention, mlp = (f'{name}.{part}' if part in parts else None for part in ('norm1', 'attn', 'mlp'))
    return Block(name, (f'{name}.drop_path1', f'{name}.drop_path2'), norm1, attention, mlp, pools)


def staged(model: nn.Module, children: str, make_block=transformer_block) -> list[Stage]:
    """The stages of a model that keeps them, each with ``blocks``, under one name."""
    stages = []
    for index, stage in enumerate(getattr(model, children)):
        names = [f'model.{children}.{index}.blocks.{number}' for number in range(len(stage.blocks))]
        blocks = [make_block(name, block) for name, block in zip(names, stage.blocks)]
        crossing = f'model.{children}.{index + 1}.downsample' if index + 1 < len(model.feature_info) else None
        stages.append(Stage(blocks, names[-1], model.feature_info[index]['num_chs'], None, crossing))
    return stages


def uncalled_qkv(attention: nn.Module) -> tuple[str, ...]:
    """Some of timm's attentions add biases to ``qkv`` themselves, and only read its weight."""
    adds_bias_itself = getattr(attention, 'q_bias', None) is not None and not attention.qkv_bias_separate
    return ('qkv',) if adds_bias_itself else ()


@contextlib.contextmanager
def plain_attention(model: nn.Module) -> Iterator[None]:
    """While this lasts, a model's attention is products and a softmax."""
    fused = [module for module in model.modules() if getattr(module, 'fused_attn', False)]
    for module in fused:
        module.fused_attn = False
    try:
        yield
    finally:
        for module in fused:
            module.fused_attn = True


def pad_to(images: Tensor, multiple: int) -> Tensor:
    """Zeros at the bottom and on the right, to multiples in height and width."""
    height, width = (-length % multiple for length in images.shape[2:])
    return F.pad(images, (0, width, 0, height))
