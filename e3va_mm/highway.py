"""The trainable highway, a stage (or a segment of one) at a time (arXiv 2306.09729, section 3).

Within a stage the paper adds to the highway state, block by block, every tap and its adapter's delta::

    h_l = h_{l-1} + A(a_l) + A(m_l),    A(z) = z + delta(z)

The taps themselves sum up to the backbone's own progress, so at the end of the stage
``h = x_end + (h_start - x_start) + sum_k delta_k(tap_k)``: what the highway carries is its *offset* from the
backbone, and that offset grows by one batched sum of deltas a stage.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .adapters import AdapterWeights, BottleneckWeights, stage_delta
from .checks import check_count
from .tap_record import EXACT, TapRecord, TapStorage, stored_dtype

INITS = ('zero', 'kaiming')
BASES = ('learned', 'pca')


class StageHighway(nn.Module):
    """The adapters of one stage, or of a segment of it; ``49.5 C + 128`` parameters each at the defaults.

    Args:
        num_adapters: taps of the stage: two a block for Swin.
        embed_dims: width ``C`` of the stage's tokens.
        rank: rank of a branch.
        branches: low-rank branches summed in a projection.
        hidden_ratio: hidden width of the bottleneck over ``embed_dims``.
        init: 'zero' starts with every delta exactly zero (``Q'`` and its bias are 0, all other factors keep the
            variance of their input); 'kaiming' draws all factors, as in the authors' public LoRand code.
        basis: 'learned' trains the input basis ``P``. 'pca' fixes it to the leading principal components of each tap
            over the first training batch, scaled to unit variance; then no tap has to be kept for the backward pass.
        mixing: kernel size (odd) of a depthwise convolution over each tap's rank-space image, added to it; zero at the
            start. An extension of the paper's adapter, whose tokens do not see one another; 0 has none.
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
        basis: str = 'learned',
        mixing: int = 0,
        storage: TapStorage = EXACT,
    ) -> None:
        super().__init__()
        check_adapter_options(rank, branches, hidden_ratio, init, basis, mixing)
        width, hidden = rank * branches, max(1, int(embed_dims * hidden_ratio))
        if basis == 'pca' and width > embed_dims:
            raise ValueError(f"adapter.basis='pca' finds {embed_dims} components, not rank * branches = {width}")
        self.init, self.storage = init, storage
        self.down_in = nn.Parameter(torch.empty(num_adapters, embed_dims, width))
        self.core = nn.Parameter(torch.empty(num_adapters, branches, rank, rank))
        self.down_out = nn.Parameter(torch.empty(num_adapters, width, hidden))
        self.down_bias = nn.Parameter(torch.empty(num_adapters, hidden))
        self.up_in = nn.Parameter(torch.empty(num_adapters, hidden, width))
        self.up_out = nn.Parameter(torch.empty(num_adapters, width, embed_dims))
        self.up_bias = nn.Parameter(torch.empty(num_adapters, embed_dims))
        self.mixing = nn.Parameter(torch.empty(num_adapters, width, mixing, mixing)) if mixing else None
        self.basis_is_fitted = True
        if basis == 'pca':
            self.down_in.requires_grad_(False)
            self.register_buffer('fitted', torch.zeros((), dtype=torch.bool))
            self.basis_is_fitted = False
        self.reset_parameters()

    @property
    def weights(self) -> AdapterWeights:
        bottleneck = BottleneckWeights(*(getattr(self, name) for name in BottleneckWeights._fields))
        return AdapterWeights(self.down_in, bottleneck, self.mixing)

    def reset_parameters(self) -> None:
        for name, factor in self.named_parameters(recurse=False):
            if name.endswith(('bias', 'mixing')) or (name == 'up_out' and self.init == 'zero'):
                nn.init.zeros_(factor)
            else:
                # The factors multiply tokens from the right, so the second-to-last dimension is the fan-in.
                nn.init.normal_(factor, std=1 / math.sqrt(factor.shape[-2]))

    def record(self) -> TapRecord:
        """An empty record, to be filled with the stage's taps in their order and passed to :meth:`forward`."""
        return TapRecord(self.down_in, self.storage)

    def forward(self, record: TapRecord, size: tuple[int, int] | None = None) -> Tensor:
        """Sum of the deltas of the stage's taps.

        Args:
            record: ``num_adapters`` taps (B, L, C) without gradient.
            size: height and width of the tokens; ``mixing`` needs it.

        Returns:
            (B, L, C) in the taps' dtype; gradient flows to the adapters alone.
        """
        return stage_delta(record, self.weights, size)

    def needs_basis(self) -> bool:
        """Whether ``P`` is to be fixed to principal components that have not been computed yet."""
        if not self.basis_is_fitted:
            # Read once: a checkpoint may have brought the basis, and reading synchronises with the device.
            self.basis_is_fitted = bool(self.fitted)
        return not self.basis_is_fitted

    def fit_basis(self) -> Callable[[Tensor], None]:
        """A visitor of the stage's taps that fixes each adapter's ``P`` to its tap's principal components.

        The components are those over the tokens of all processes, which must visit at the same time.
        """
        bases = iter(self.down_in)

        def visit(tap: Tensor) -> None:
            with torch.no_grad(), torch.autocast(tap.device.type, enabled=False):
                basis = next(bases)
                basis.copy_(principal_components(tap.reshape(-1, tap.shape[-1]).float(), basis.shape[-1]))

        self.fitted.fill_(True)
        self.basis_is_fitted = True
        return visit

    def extra_repr(self) -> str:
        num_adapters, branches, rank, _ = self.core.shape
        return f'{num_adapters} adapters, embed_dims={self.down_in.shape[1]}, rank={rank}, branches={branches}'


def principal_components(tokens: Tensor, number: int) -> Tensor:
    """Projection of tokens (M, C) on their leading principal components, (C, number), to unit variance each."""
    moments = torch.cat(
        [tokens.t() @ tokens, tokens.sum(0, keepdim=True), tokens.new_full((1, tokens.shape[1]), len(tokens))]
    )
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(moments)
    second, first, count = moments[:-2], moments[-2], moments[-1, 0]
    variances, directions = torch.linalg.eigh(second / count - first.outer(first) / count**2)
    variances, directions = variances.flip(0)[:number], directions.flip(1)[:, :number]
    return directions / variances.clamp(min=1e-6 * variances[0].clamp(min=1e-30)).sqrt()


class Recomputed(torch.autograd.Function):
    """``function(state)``, for a cheap function: only ``state`` is kept, in ``limit`` where that is narrower.

    The backward pass evaluates ``function`` again, under the autocast state of the forward pass. Plain autograd would
    keep the inputs of each of its norms, in fp32.

    Args (of ``apply``):
        function: a tensor to a tuple of tensors (or ``None``), using ``parameters`` and constants. No gradient flows
            through outputs that it has detached.
        limit: dtype, or ``None`` to keep the state as it is and the gradients exact.
        state: (...).
        parameters: the trained parameters that ``function`` uses.
    """

    @staticmethod
    def forward(ctx, function, limit, state, *parameters):
        device = state.device.type
        ctx.set_materialize_grads(False)
        ctx.function, ctx.dtype = function, state.dtype
        ctx.autocast = (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        ctx.save_for_backward(state.to(stored_dtype(state.dtype, limit)), *parameters)
        return function(state.detach())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        kept, *parameters = ctx.saved_tensors
        device, dtype, enabled = ctx.autocast
        state = kept.to(ctx.dtype).detach().requires_grad_()
        with torch.enable_grad(), torch.autocast(device, dtype=dtype, enabled=enabled):
            # A view, because module hooks (FlopCounterMode has them) refuse leaves inside of autograd.grad.
            outputs = ctx.function(state.view_as(state))
        # An output that nothing has used still has a gradient, of zero: its parameters are no idle ones to DDP.
        used = [(output, grad) for output, grad in zip(outputs, grads) if output is not None and output.requires_grad]
        outputs, grads = zip(*((output, torch.zeros_like(output) if grad is None else grad) for output, grad in used))
        return (None, None, *torch.autograd.grad(outputs, (state, *parameters), grads))


def check_adapter_options(rank, branches, hidden_ratio, init, basis, mixing) -> None:
    """Raises a ValueError that names the first option outside its range."""
    for name, value in (('rank', rank), ('branches', branches)):
        check_count(f'adapter.{name}', value)
    if isinstance(hidden_ratio, bool) or not isinstance(hidden_ratio, (int, float)) or hidden_ratio <= 0:
        raise ValueError(f'adapter.hidden_ratio must be a number above 0, got {hidden_ratio!r}')
    if init not in INITS:
        raise ValueError(f'init must be one of {INITS}, got {init!r}')
    if basis not in BASES:
        raise ValueError(f'adapter.basis must be one of {BASES}, got {basis!r}')
    if isinstance(mixing, bool) or not isinstance(mixing, int) or mixing < 0 or (mixing and mixing % 2 == 0):
        raise ValueError(f'adapter.mixing must be 0 or an odd integer, got {mixing!r}')
