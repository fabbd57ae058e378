"""Dual low-rank adapters: the mathematics, free of modules and toolboxes.

An adapter adds to the tap ``z`` a bottleneck whose two projections are themselves low-rank::

    delta(z) = gelu(z W_down + b_down) W_up + b_up
    W_down = sum_i P_i K_i Q_i          W_up = sum_i P'_i K_i Q'_i

from "Parameter-efficient is not sufficient: Exploring Parameter, Memory, and Time Efficient Adapter Tuning for
Dense Predictions" (arXiv 2306.09729). The branches ``i`` are laid side by side, so that a projection is three thin
products (``z P``, a block-diagonal core, ``Q``) and the full matrix is never built.

Deviation: the paper applies the adapters of a stage one after the other. They do not depend on one another, so
:func:`stage_delta` evaluates all of them at once and sums them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .tap_record import TapRecord, decompress, in_trace, records_gradient

# Adapters evaluated together; bounds the transient hidden activations (group x tokens x hidden) of a stage.
_GROUP_BYTES = 128 * 2**20
# Tokens of a chunk, at least, and chunks, at most, in which sums over tokens are formed.
_CHUNK_TOKENS, _MOST_CHUNKS = 1024, 64


class BottleneckWeights(NamedTuple):
    """What follows the input basis in ``N`` adapters of width ``C``, hidden width ``H``, total rank ``W``."""

    core: Tensor  # K,  (N, branches, rank, rank), shared by both projections
    down_out: Tensor  # Q,  (N, W, H)
    down_bias: Tensor  # (N, H)
    up_in: Tensor  # P', (N, H, W)
    up_out: Tensor  # Q', (N, W, C)
    up_bias: Tensor  # (N, C)

    def to(self, dtype: torch.dtype) -> BottleneckWeights:
        return BottleneckWeights(*cast_together(self, dtype))

    def select(self, adapters: slice) -> BottleneckWeights:
        return BottleneckWeights(*(weight[adapters] for weight in self))


class AdapterWeights(NamedTuple):
    """Weights of ``N`` adapters; ``W = branches * rank``."""

    down_in: Tensor  # P,  (N, C, W)
    bottleneck: BottleneckWeights


def single_delta(tap, down_in, core, down_out, down_bias, up_in, up_out, up_bias, up_core=None) -> Tensor:
    """The delta of one adapter in plain autograd, (..., C) to the same: the definition of :func:`stage_delta`.

    ``up_core`` is the second projection's core where it has one of its own.
    """
    hidden = F.gelu(tap @ down_in @ torch.block_diag(*core) @ down_out + down_bias)
    return hidden @ up_in @ torch.block_diag(*(core if up_core is None else up_core)) @ up_out + up_bias


def stage_delta(record: TapRecord, weights: AdapterWeights) -> Tensor:
    """Sum of the deltas of all adapters of a stage.

    Args:
        record: the ``N`` taps of the stage, frozen activations (..., C); its ``down_in`` is that of ``weights``.
        weights: the ``N`` adapters. The products run in the taps' dtype; the weights keep theirs.

    Returns:
        (..., C), C that of the stage, in the taps' dtype, with gradient to the weights alone.

    Raises:
        ValueError: the record does not hold ``N`` taps.
        RuntimeError: a gradient is asked for, and the record was made where none was.
    """
    if record.num_taps != len(weights.down_in):
        raise ValueError(f'this stage has {len(weights.down_in)} adapters but was given {record.num_taps} taps')
    if record.kept is None and records_gradient() and weights.down_in.requires_grad:
        raise RuntimeError('the taps were recorded under no_grad, so the gradient of the adapters is not to be had')
    shape = (*record.shape[:-1], weights.bottleneck.up_bias.shape[-1])
    if not records_gradient():
        return expand_ranks(record.images(), weights.bottleneck)[0].view(shape)
    reduced = TapReduction.apply(record.reduced, record.kept, record.scales, record.sample, weights.down_in)
    return RankExpansion.apply(reduced, *weights.bottleneck).view(shape)


def cast_together(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The tensors in ``dtype``, by one cast for all of them: they are many and small, and each cast has its launch."""
    if all(tensor.dtype == dtype for tensor in tensors):
        return tensors
    flat = torch.cat([tensor.flatten() for tensor in tensors]).to(dtype)
    parts = flat.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor) for part, tensor in zip(parts, tensors)]


class TapReduction(torch.autograd.Function):
    """The rank-space images ``z P`` of a :class:`~e3va_mm.highway.tap_record.TapRecord`, with gradient to ``P``."""

    @staticmethod
    def forward(ctx, reduced, kept, scales, sample, down_in):
        ctx.save_for_backward(kept, scales, sample, down_in)
        return reduced.view_as(reduced)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        kept, scales, sample, down_in = ctx.saved_tensors
        grad_down_in = None
        if ctx.needs_input_grad[4]:
            grad_down_in = torch.empty_like(down_in)
            with torch.autocast(grad.device.type, enabled=False):
                for group in _groups(kept):
                    scale = None if scales is None else scales[group].view(-1, 1, 1)
                    taps = decompress(kept[group], scale, grad.dtype)
                    grad_down_in[group].copy_(_token_sum(taps, _sampled(grad[group], sample)))
        return None, None, None, None, grad_down_in


def _sampled(grad_reduced: Tensor, sample: Tensor | None) -> Tensor:
    """The kept tokens' share of a gradient (n, M, W), scaled so that its expectation is that of all tokens."""
    if sample is None:
        return grad_reduced
    return grad_reduced.index_select(1, sample) * (grad_reduced.shape[1] / len(sample))


def expand_ranks(reduced: Tensor, weights: BottleneckWeights) -> tuple[Tensor, BottleneckWeights]:
    """Rank-space images (N, M, W) to the sum of the deltas (M, C), with the weights as cast.

    The cores are multiplied into the matrices beside them first, which costs nothing beside a product over the tokens.
    """
    with torch.autocast(reduced.device.type, enabled=False):
        cast = weights.to(reduced.dtype)
        branches, rank = cast.core.shape[1:3]
        down = (cast.core @ cast.down_out.unflatten(1, (branches, rank))).flatten(1, 2)
        up = (cast.up_in.unflatten(2, (branches, rank)).transpose(1, 2) @ cast.core).transpose(1, 2).flatten(2)
        delta = cast.up_bias.sum(0).expand(reduced.shape[1], -1)
        for group in _groups(reduced, down.shape[-1]):
            hidden = _affine(reduced[group], down[group], cast.down_bias[group].unsqueeze(1))
            delta = torch.addmm(delta, _side_by_side(F.gelu(hidden) @ up[group]), cast.up_out[group].flatten(0, 1))
    return delta, cast


def _affine(left: Tensor, right: Tensor, bias: Tensor) -> Tensor:
    # What counts operations in a trace does not know baddbmm.
    return left @ right + bias if in_trace() else torch.baddbmm(bias, left, right)


class RankExpansion(torch.autograd.Function):
    """From rank-space images (N, M, W) to the sum of the adapters' deltas, (M, C).

    Only its inputs are kept, the weights as they were cast: the hidden activations are computed again, a group of
    adapters at a time.
    """

    @staticmethod
    def forward(ctx, reduced, *fields):
        weights = BottleneckWeights(*fields)
        delta, cast = expand_ranks(reduced, weights)
        ctx.weight_dtype = weights.core.dtype
        ctx.save_for_backward(reduced, *cast)
        return delta

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        reduced, *fields = ctx.saved_tensors
        weights = BottleneckWeights(*fields)
        core = _block_diagonal(weights.core)
        grad, grad_reduced = grad.to(reduced.dtype), torch.empty_like(reduced)
        grads = BottleneckWeights(*(torch.empty_like(weight, dtype=ctx.weight_dtype) for weight in weights))
        with torch.autocast(grad.device.type, enabled=False):
            grads.up_bias.copy_(grad.sum(0).expand_as(weights.up_bias))
            for group in _groups(reduced, weights.down_out.shape[-1]):
                members = (reduced[group], core[group], weights.select(group), grads.select(group))
                grad_reduced[group].copy_(_group_backward(grad, *members))
        return grad_reduced, *grads


def _group_backward(grad, reduced, core, weights, grads) -> Tensor:
    """Fills ``grads`` of a group of adapters; returns the gradient of its rank-space images, (n, M, W)."""
    mixed, hidden, active, inner, expanded = _expand(reduced, core, weights)
    num_adapters, num_tokens, width = reduced.shape
    grads.up_out.copy_((_side_by_side(expanded).t() @ grad).view_as(weights.up_out))
    grad_expanded = grad @ weights.up_out.flatten(0, 1).t()
    grad_expanded = grad_expanded.view(num_tokens, num_adapters, width).transpose(0, 1)
    grad_inner = grad_expanded @ core.mT
    grads.up_in.copy_(_token_sum(active, grad_inner))
    del active  # As large as the transients of a group get.
    grad_hidden = torch.ops.aten.gelu_backward(grad_inner @ weights.up_in.mT, hidden)
    grads.down_bias.copy_(grad_hidden.sum(1))
    grads.down_out.copy_(_token_sum(mixed, grad_hidden))
    grad_mixed = grad_hidden @ weights.down_out.mT
    grad_core = _token_sum(inner, grad_expanded) + _token_sum(reduced, grad_mixed)
    grads.core.copy_(_diagonal_blocks(grad_core, weights.core))
    return grad_mixed @ core.mT


def _expand(reduced, core, weights) -> tuple[Tensor, ...]:
    """From ``z P`` (n, M, W) to the input of ``Q'`` (n, M, W), with everything in between."""
    mixed = reduced @ core
    hidden = torch.baddbmm(weights.down_bias.unsqueeze(1), mixed, weights.down_out)
    active = F.gelu(hidden)
    inner = active @ weights.up_in
    return mixed, hidden, active, inner, inner @ core


def _token_sum(left: Tensor, right: Tensor) -> Tensor:
    """``left.mT @ right`` of (n, M, p) and (n, M, q), as a sum over chunks of the tokens.

    Batched products do not split the summed dimension by themselves, and ``n`` small outputs leave a GPU mostly idle.
    """
    num_tokens = left.shape[1]
    most = min(_MOST_CHUNKS, num_tokens // _CHUNK_TOKENS)
    chunks = next((number for number in range(most, 1, -1) if num_tokens % number == 0), 1)
    if chunks == 1:
        return left.mT @ right
    products = left.unflatten(1, (chunks, -1)).mT @ right.unflatten(1, (chunks, -1))
    return products.sum(1, dtype=torch.promote_types(left.dtype, torch.float32))


def _groups(stacked: Tensor, width: int | None = None) -> list[slice]:
    """Slices of the adapters of (N, M, any) such that those of one, at ``width`` values a token, are not too large."""
    num_adapters, num_tokens, own_width = stacked.shape
    if in_trace():  # The number of tokens may be open.
        return [slice(None)]
    adapter_bytes = max(1, num_tokens * (width or own_width) * max(2, stacked.element_size()))
    size = max(1, _GROUP_BYTES // adapter_bytes)
    return [slice(start, start + size) for start in range(0, num_adapters, size)]


def _side_by_side(stacked: Tensor) -> Tensor:
    """(n, M, W) -> (M, n * W): the adapters' rank dimensions concatenated, so that one product sums over them."""
    return stacked.transpose(0, 1).flatten(1)


def _block_diagonal(core: Tensor) -> Tensor:
    """(N, branches, rank, rank) -> (N, W, W)."""
    num_adapters, branches, rank, _ = core.shape
    dense = core.new_zeros(num_adapters, branches, rank, branches, rank)
    dense.diagonal(dim1=1, dim2=3).copy_(core.permute(0, 2, 3, 1))
    return dense.view(num_adapters, branches * rank, branches * rank)


def _diagonal_blocks(dense: Tensor, like: Tensor) -> Tensor:
    """Adjoint of :func:`_block_diagonal`."""
    num_adapters, branches, rank, _ = like.shape
    return dense.view(num_adapters, branches, rank, branches, rank).diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
