"""The adapters of one stage (arXiv 2306.09729, section 3).

Within a stage the paper adds to the highway state, block by block, every tap and its adapter's delta::

    h_l = h_{l-1} + A(a_l) + A(m_l),    A(z) = z + delta(z)

The taps themselves sum up to the backbone's own progress, so at the end of the stage
``h = x_end + (h_start - x_start) + sum_k delta_k(tap_k)``: all deltas of a stage are one batched sum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..checks import check_choice, check_count, check_positive
from .adapters import AdapterWeights, BottleneckWeights, stage_delta
from .tap_record import EXACT, TapRecord, TapStorage

INITS = ('zero', 'kaiming')


class StageAdapters(nn.Module):
    """The adapters of one stage; ``49.5 C + 128`` parameters each at the defaults.

    Args:
        num_adapters: taps of the stage: two a block for Swin.
        embed_dims: width ``C`` of the stage's tokens.
        tap_dims: width of its taps, where that is another.
        rank: rank of a branch.
        branches: low-rank branches summed in a projection.
        hidden_ratio: hidden width of the bottleneck over ``embed_dims``.
        init: 'zero' starts with every delta exactly zero (``Q'`` and its bias are 0, all other factors keep the
            variance of their input); 'kaiming' draws all factors, as in the authors' public LoRand code.
        storage: what the backward pass keeps of the taps.

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
        storage: TapStorage = EXACT,
        tap_dims: int | None = None,
    ) -> None:
        super().__init__()
        check_count('adapter.rank', rank)
        check_count('adapter.branches', branches)
        check_positive('adapter.hidden_ratio', hidden_ratio)
        check_choice('init', init, INITS)
        width, hidden = rank * branches, max(1, int(embed_dims * hidden_ratio))
        self.init, self.storage = init, storage
        self.down_in = nn.Parameter(torch.empty(num_adapters, tap_dims or embed_dims, width))
        self.core = nn.Parameter(torch.empty(num_adapters, branches, rank, rank))
        self.down_out = nn.Parameter(torch.empty(num_adapters, width, hidden))
        self.down_bias = nn.Parameter(torch.empty(num_adapters, hidden))
        self.up_in = nn.Parameter(torch.empty(num_adapters, hidden, width))
        self.up_out = nn.Parameter(torch.empty(num_adapters, width, embed_dims))
        self.up_bias = nn.Parameter(torch.empty(num_adapters, embed_dims))
        self.reset_parameters()

    @property
    def weights(self) -> AdapterWeights:
        bottleneck = BottleneckWeights(*(getattr(self, name) for name in BottleneckWeights._fields))
        return AdapterWeights(self.down_in, bottleneck)

    def reset_parameters(self) -> None:
        for name, factor in self.named_parameters(recurse=False):
            if name.endswith('bias') or (name == 'up_out' and self.init == 'zero'):
                nn.init.zeros_(factor)
            else:
                # The factors multiply tokens from the right, so the second-to-last dimension is the fan-in.
                nn.init.normal_(factor, std=1 / math.sqrt(factor.shape[-2]))

    def record(self) -> TapRecord:
        """An empty record, to be filled with the stage's taps in their order and passed to :meth:`forward`."""
        return TapRecord(self.down_in, self.storage)

    def forward(self, record: TapRecord) -> Tensor:
        """Sum of the deltas of the stage's taps.

        Args:
            record: ``num_adapters`` taps (B, L, tap_dims) without gradient.

        Returns:
            (B, L, C) in the taps' dtype; gradient flows to the adapters alone.
        """
        return stage_delta(record, self.weights)

    def extra_repr(self) -> str:
        num_adapters, branches, rank, _ = self.core.shape
        return f'{num_adapters} adapters, embed_dims={self.up_out.shape[-1]}, rank={rank}, branches={branches}'
