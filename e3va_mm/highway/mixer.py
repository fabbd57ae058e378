"""Spatial mixing of the highway's state: an extension of the paper, whose adapters see one token each.

The kernels of several sizes are those of Mona (arXiv 2408.08345). Mona mixes inside the backbone, behind every residual
addition, and pays with a graph through all blocks; here the mixing is on the highway, once a stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_count, check_kernel_sizes
from .adapters import cast_together


class MultiScaleDepthwise(nn.Module):
    """``x + mean_k conv_k(x)`` with depthwise convolutions of several (odd) sizes, (B, width, H, W) to the same shape.

    It is evaluated as the one convolution that it is equal to, see :func:`merge_filters`.
    """

    def __init__(self, width: int, kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, size, padding=size // 2, groups=width) for size in kernel_sizes
        )
        self.kernel_size = max(kernel_sizes)
        places = [_places(size, self.kernel_size) for size in kernel_sizes]
        self.register_buffer('places', torch.cat(places) / len(places), persistent=False)
        self.register_buffer('identity', _places(1, self.kernel_size), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return _depthwise(image, *(merged[0] for merged in merge_filters([self])))


def merge_filters(filters: Sequence[MultiScaleDepthwise]) -> tuple[Tensor, Tensor]:
    """The kernels (N, width, 1, size, size) and biases (N, width) that filters of equal width and sizes are equal to.

    They are put together for all filters at once: on small images each operation costs its launch.
    """
    first = filters[0]
    sizes = [conv.weight[0].numel() for conv in first.convs]
    with torch.autocast(first.places.device.type, enabled=False):
        kernels = first.identity
        for convs, places in zip(zip(*(each.convs for each in filters)), first.places.split(sizes)):
            kernels = torch.addmm(kernels, _rows([conv.weight for conv in convs]).flatten(1), places)
        biases = torch.cat([conv.bias for each in filters for conv in each.convs])
        biases = biases.view(len(filters), len(sizes), -1).mean(1)
    return kernels.view(*biases.shape, 1, first.kernel_size, first.kernel_size), biases


def _rows(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _depthwise(image: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    return F.conv2d(image, kernel, bias, padding=kernel.shape[-1] // 2, groups=len(bias))


def _places(size: int, largest: int) -> Tensor:
    """(size², largest²): the place of each element of a flattened kernel in that of a larger one, around it."""
    return F.pad(torch.eye(size**2).view(-1, size, size), [(largest - size) // 2] * 4).flatten(1)


class MixerWeights(NamedTuple):
    """What a mixer of width ``w`` for tokens of width ``C`` computes with; all but the norm's in one dtype."""

    norm_weight: Tensor  # (C,)
    norm_bias: Tensor  # (C,)
    kernel: Tensor  # (w, 1, k, k)
    kernel_bias: Tensor  # (w,)
    down: Tensor  # (w, C)
    down_bias: Tensor  # (w,)
    up: Tensor  # (C, w)
    up_bias: Tensor  # (C,)


class StateMixer(nn.Module):
    """``h + gelu(u + mean_k conv_k(u)) W_up + b_up`` with ``u = norm(h) W_down + b_down``; silent at the start.

    Args:
        embed_dims: width of the tokens.
        width: of the bottleneck, in which the tokens are mixed.
        kernel_sizes: of its depthwise convolutions, odd.

    Raises:
        ValueError: an option outside its range, named with its value.
    """

    def __init__(self, embed_dims: int, width: int = 32, kernel_sizes: Sequence[int] = (3, 5, 7)) -> None:
        super().__init__()
        check_count('mixer.width', width)
        check_kernel_sizes('mixer.kernel_sizes', kernel_sizes)
        self.norm = nn.LayerNorm(embed_dims)
        self.down = nn.Linear(embed_dims, width)
        self.filter = MultiScaleDepthwise(width, kernel_sizes)
        self.up = nn.Linear(width, embed_dims)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, state: Tensor, size: tuple[int, int]) -> Tensor:
        """The mixed state, in the dtype of ``state``; gradient flows through it.

        Args:
            state: tokens (B, H * W, C).
            size: their height H and width W.
        """
        return mix(state, size, mixer_weights([self])[0])


def mixer_weights(mixers: Sequence[StateMixer]) -> list[MixerWeights]:
    """The weights of mixers of equal width, in the dtype that autocast computes in; few operations for all of them."""
    if not mixers:
        return []
    kernels, biases = merge_filters([mixer.filter for mixer in mixers])
    linears = [weight for mixer in mixers for weight in (*mixer.down.parameters(), *mixer.up.parameters())]
    device = kernels.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else kernels.dtype
    kernels, biases, *linears = cast_together([kernels, biases, *linears], dtype)
    quadruples = zip(*[iter(linears)] * 4)
    return [
        MixerWeights(mixer.norm.weight, mixer.norm.bias, *weights, *linear)
        for mixer, *weights, linear in zip(mixers, kernels, biases, quadruples)
    ]


def mix(state: Tensor, size: tuple[int, int], weights: MixerWeights) -> Tensor:
    """What :class:`StateMixer` is, as a function of its weights."""
    with torch.autocast(state.device.type, enabled=False):
        normed = F.layer_norm(state, state.shape[-1:], weights.norm_weight, weights.norm_bias)
        reduced = F.linear(normed.to(weights.down.dtype), weights.down, weights.down_bias)
        image = reduced.transpose(1, 2).unflatten(2, size)
        active = F.gelu(_depthwise(image, weights.kernel, weights.kernel_bias)).flatten(2).transpose(1, 2)
        return (state + F.linear(active, weights.up, weights.up_bias)).to(state.dtype)
