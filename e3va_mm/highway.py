"""The trainable highway, a stage at a time (arXiv 2306.09729, section 3).

Within a stage the paper adds to the highway state, block by block, every tap and its adapter's delta::

    h_l = h_{l-1} + A(a_l) + A(m_l),    A(z) = z + delta(z)

The taps themselves sum up to the backbone's own progress, so at the end of the stage
``h = x_end + (h_start - x_start) + sum_k delta_k(tap_k)``: what the highway carries is its *offset* from the
backbone, and that offset grows by one batched sum of deltas a stage.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .adapters import AdapterWeights, stage_delta

INITS = ('zero', 'kaiming')


class StageHighway(nn.Module):
    """The adapters of one stage; ``49.5 C + 128`` parameters each at the defaults.

    Args:
        num_adapters: taps of the stage: two a block for Swin.
        embed_dims: width ``C`` of the stage's tokens.
        rank: rank of a branch.
        branches: low-rank branches summed in a projection.
        hidden_ratio: hidden width of the bottleneck over ``embed_dims``.
        init: 'zero' starts with every delta exactly zero (``Q'`` and its bias are 0, all other factors keep the
            variance of their input); 'kaiming' draws all factors, as in the authors' public LoRand code.
        saved_dtype: see :func:`~e3va_mm.adapters.stage_delta`.

    Raises:
        ValueError: an option outside its range, named with its value.
    """

    def __init__(
        self,
        num_adapters: int,
        embed_dims: int,
        rank: int = 8,
        branches: int = 2,
        hidden_ratio: float = 0.5,
        init: str = 'zero',
        saved_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_adapter_options(rank, branches, hidden_ratio, init)
        width, hidden = rank * branches, max(1, int(embed_dims * hidden_ratio))
        self.init, self.saved_dtype = init, saved_dtype
        self.down_in = nn.Parameter(torch.empty(num_adapters, embed_dims, width))
        self.core = nn.Parameter(torch.empty(num_adapters, branches, rank, rank))
        self.down_out = nn.Parameter(torch.empty(num_adapters, width, hidden))
        self.down_bias = nn.Parameter(torch.empty(num_adapters, hidden))
        self.up_in = nn.Parameter(torch.empty(num_adapters, hidden, width))
        self.up_out = nn.Parameter(torch.empty(num_adapters, width, embed_dims))
        self.up_bias = nn.Parameter(torch.empty(num_adapters, embed_dims))
        self.reset_parameters()

    @property
    def weights(self) -> AdapterWeights:
        return AdapterWeights(*(getattr(self, name) for name in AdapterWeights._fields))

    def reset_parameters(self) -> None:
        for name, factor in self.named_parameters(recurse=False):
            if name.endswith('bias') or (name == 'up_out' and self.init == 'zero'):
                nn.init.zeros_(factor)
            else:
                # The factors multiply tokens from the right, so the second-to-last dimension is the fan-in.
                nn.init.normal_(factor, std=1 / math.sqrt(factor.shape[-2]))

    def forward(self, taps: list[Tensor]) -> Tensor:
        """Sum of the deltas of the stage's taps.

        Args:
            taps: ``num_adapters`` tensors (B, L, C) without gradient.

        Returns:
            (B, L, C) in the taps' dtype; gradient flows to the adapters alone.
        """
        if len(taps) != len(self.core):
            raise ValueError(f'this stage has {len(self.core)} adapters but was given {len(taps)} taps')
        return stage_delta(taps, self.weights, self.saved_dtype)

    def extra_repr(self) -> str:
        num_adapters, branches, rank, _ = self.core.shape
        return f'{num_adapters} adapters, embed_dims={self.down_in.shape[1]}, rank={rank}, branches={branches}'


def check_adapter_options(rank, branches, hidden_ratio, init) -> None:
    """Raises a ValueError that names the first option outside its range."""
    for name, value in (('rank', rank), ('branches', branches)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f'adapter.{name} must be an integer of at least 1, got {value!r}')
    if isinstance(hidden_ratio, bool) or not isinstance(hidden_ratio, (int, float)) or hidden_ratio <= 0:
        raise ValueError(f'adapter.hidden_ratio must be a number above 0, got {hidden_ratio!r}')
    if init not in INITS:
        raise ValueError(f'init must be one of {INITS}, got {init!r}')
