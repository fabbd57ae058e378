"""Backbones as stages of residual blocks: what every family has to say, and mmseg's MiT.

A family says how images become tokens, which blocks a stage has, how one stage leads to the next, and which modules
put out what a block adds to the residual stream: the taps. It calls the stock modules and copies none of their code.
mm's Swin is in ``taps.py``, timm's families are in ``timm_stages.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Size = tuple[int, int]


class Stages(ABC):
    """A backbone in stages; tokens are (B, L, C), L = height * width, unless said otherwise.

    Args:
        model: the stock model.

    Attributes:
        blocks: the blocks of each stage.
        embed_dims: width of each stage.
        levels: the stages that have an output, by increasing stride or depth.
        num_prefix: tokens that are no patches (class, registers), ahead of the others in the frozen stream.
    """

    num_prefix = 0
    # Linear layers of which the family uses the weight without calling them: nothing injected there would act.
    bypassed: tuple[str, ...] = ()

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.blocks: list[list[nn.Module]] = []
        self.embed_dims: list[int] = []
        self.levels: list[int] = []

    @abstractmethod
    def embed(self, images: Tensor) -> tuple[Tensor, Size]:
        """Images (B, 3, H, W) -> tokens at the start of the first stage, and their height and width."""

    @abstractmethod
    def advance(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        """From the end of a stage to the start of the next."""

    def carry(self, stage: int, tokens: Tensor, size: Size, next_size: Size) -> Tensor:
        """What the highway's state goes through where the frozen tokens go through :meth:`advance`."""
        return self.advance(stage, tokens, size)[0]

    @abstractmethod
    def run_block(self, block: nn.Module, tokens: Tensor, size: Size) -> Tensor:
        """Tokens behind a block."""

    def branches(self, block: nn.Module) -> list[nn.Module]:
        """Modules whose outputs the block adds to the residual stream, in the order of execution."""
        if not hasattr(block, 'drop_path1'):
            raise ValueError(f'{type(block).__name__} has not the two residual branches that blocks of its family have')
        return [block.drop_path1, block.drop_path2]

    def arrange(self, branch: nn.Module, output: Tensor, size: Size) -> Tensor:
        """A branch's output as patch tokens."""
        return output.flatten(1, 2) if output.ndim == 4 else output[:, self.num_prefix :]

    def remember(self) -> None:  # noqa: B027 (most families have nothing to remember)
        """Called when the base weights have been loaded, before anything is trained."""

    def norm(self, stage: int) -> nn.Module:
        """A new output norm (over the last dimension) of a stage, with the weights of timm's where it has one."""
        return nn.LayerNorm(self.embed_dims[stage], eps=1e-6)


class ChannelAffine(nn.Module):
    """``weight * x + bias`` over the last dimension; the identity at the start."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dims)), nn.Parameter(torch.zeros(dims))

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens * self.weight + self.bias


class MiTStages(Stages):
    """mmseg's ``MixVisionTransformer`` (SegFormer, arXiv 2105.15203).

    A stage's norm has the output and leads to the next stage. As an output norm it is trained; the next stage starts
    from what it was before, of which a copy is kept.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.blocks = [list(layer[1]) for layer in model.layers]
        self.embed_dims = [layer[2].normalized_shape[0] for layer in model.layers]
        self.levels = list(range(len(self.blocks)))
        self.remember()

    def remember(self) -> None:
        self._frozen_norms = [
            (layer[2].weight.detach().clone(), layer[2].bias.detach().clone()) for layer in self.model.layers
        ]

    def embed(self, images: Tensor) -> tuple[Tensor, Size]:
        return self.model.layers[0][0](images)

    def advance(self, stage: int, tokens: Tensor, size: Size) -> tuple[Tensor, Size]:
        dims, norm = self.embed_dims[stage], self.model.layers[stage][2]
        weight, bias = self._frozen_norms[stage] = [tensor.to(tokens.device) for tensor in self._frozen_norms[stage]]
        normed = F.layer_norm(tokens.to(weight.dtype), (dims,), weight, bias, norm.eps)
        return self.model.layers[stage + 1][0](to_nchw(normed, size))

    def run_block(self, block: nn.Module, tokens: Tensor, size: Size) -> Tensor:
        return block(tokens, size)

    def branches(self, block: nn.Module) -> list[nn.Module]:
        return [block.attn.dropout_layer, block.ffn.dropout_layer]


def pool_and_pad(tokens: Tensor, size: Size, next_size: Size, dims: int) -> Tensor:
    """A stage transition without weights: averages to ``next_size``, drops channels or adds zeros up to ``dims``."""
    pooled = F.adaptive_avg_pool2d(to_nchw(tokens, size), next_size)
    return F.pad(from_nchw(pooled)[0], (0, dims - tokens.shape[-1]))


def from_nchw(features: Tensor) -> tuple[Tensor, Size]:
    return features.flatten(2).transpose(1, 2), tuple(features.shape[2:])


def to_nchw(tokens: Tensor, size: Size) -> Tensor:
    """A view, in channels-last memory."""
    return tokens.unflatten(1, size).permute(0, 3, 1, 2)
