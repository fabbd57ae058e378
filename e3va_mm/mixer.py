"""Spatial mixing of the highway's state: an extension of the paper, whose adapters see one token each.

The kernels of several sizes are those of Mona (arXiv 2408.08345). Mona mixes inside the backbone, behind every residual
addition, and pays with a graph through all blocks; here the mixing is on the highway, once a stage.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MultiScaleDepthwise(nn.Module):
    """The mean of depthwise convolutions of several (odd) sizes, (B, width, H, W) to the same shape.

    It is evaluated as the one convolution that it is equal to, and that is put together in few operations: on small
    images each costs its launch.
    """

    def __init__(self, width: int, kernel_sizes: Sequence[int]) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, size, padding=size // 2, groups=width) for size in kernel_sizes
        )
        self.kernel_size = max(kernel_sizes)
        self.register_buffer(
            'places', torch.cat([_places(size, self.kernel_size) for size in kernel_sizes]), persistent=False
        )

    def forward(self, image: Tensor) -> Tensor:
        kernels = torch.cat([conv.weight.flatten(1) for conv in self.convs], 1) @ self.places / len(self.convs)
        bias = torch.stack([conv.bias for conv in self.convs]).mean(0)
        weight = kernels.view(-1, 1, self.kernel_size, self.kernel_size)
        return nn.functional.conv2d(image, weight, bias, padding=self.kernel_size // 2, groups=len(bias))


def _places(size: int, largest: int) -> Tensor:
    """(size², largest²): the place of each element of a flattened kernel in that of a larger one, around it."""
    return nn.functional.pad(torch.eye(size**2).view(-1, size, size), [(largest - size) // 2] * 4).flatten(1)


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
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise ValueError(f'mixer.width must be an integer of at least 1, got {width!r}')
        if (
            not isinstance(kernel_sizes, Sequence)
            or not kernel_sizes
            or any(not _is_odd(size) for size in kernel_sizes)
        ):
            raise ValueError(f'mixer.kernel_sizes must be a list of odd integers, got {kernel_sizes!r}')
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
        reduced = self.down(self.norm(state))
        mixed = self.filter(reduced.transpose(1, 2).unflatten(2, size))
        active = nn.functional.gelu(reduced + mixed.flatten(2).transpose(1, 2))
        return state + self.up(active).to(state.dtype)


def build_mixers(embed_dims: int, depth: int = 1, **options) -> nn.ModuleList:
    """``depth`` mixers for the state of one stage, one after the other; ``options`` are those of :class:`StateMixer`.

    Raises:
        ValueError: an option outside its range.
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f'mixer.depth must be an integer of at least 1, got {depth!r}')
    return nn.ModuleList(StateMixer(embed_dims, **options) for _ in range(depth))


def _is_odd(size) -> bool:
    return isinstance(size, int) and size > 0 and size % 2 == 1
