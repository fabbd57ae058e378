"""Dual low-rank adapters: the mathematics, free of modules and toolboxes.

An adapter adds to the tap ``z`` a bottleneck whose two projections are themselves low-rank::

    delta(z) = gelu(z W_down + b_down) W_up + b_up
    W_down = sum_i P_i K_i Q_i          W_up = sum_i P'_i K_i Q'_i

from "Parameter-efficient is not sufficient: Exploring Parameter, Memory, and Time Efficient Adapter Tuning for
Dense Predictions" (arXiv 2306.09729). The branches ``i`` are laid side by side, so that a projection is three thin
products (``z P``, a block-diagonal core, ``Q``) and the full matrix is never built.

Deviation: the paper applies the adapters of a stage one after the other. They do not depend on one another, so
:class:`StageDelta` evaluates all of them at once and sums them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Adapters evaluated together; bounds the transient hidden activations (group x tokens x hidden) of a stage.
_GROUP_BYTES = 64 * 2**20


class AdapterWeights(NamedTuple):
    """Weights of ``N`` adapters of width ``C``, hidden width ``H`` and total rank ``W = branches * rank``."""

    down_in: Tensor  # P,  (N, C, W)
    core: Tensor  # K,  (N, branches, rank, rank), shared by both projections
    down_out: Tensor  # Q,  (N, W, H)
    down_bias: Tensor  # (N, H)
    up_in: Tensor  # P', (N, H, W)
    up_out: Tensor  # Q', (N, W, C)
    up_bias: Tensor  # (N, C)

    def to(self, dtype: torch.dtype) -> AdapterWeights:
        return AdapterWeights(*(weight.to(dtype) for weight in self))

    def select(self, adapters: slice) -> AdapterWeights:
        return AdapterWeights(*(weight[adapters] for weight in self))


def reference_delta(taps: list[Tensor], weights: AdapterWeights) -> Tensor:
    """Sum of the adapters' deltas in plain autograd: the definition that :class:`StageDelta` is tested against.

    Args:
        taps: ``N`` tensors of tokens, (..., C).
        weights: the ``N`` adapters.

    Returns:
        (..., C), with gradient to the taps and to the weights.
    """
    return sum(_single_delta(tap, *fields) for tap, *fields in zip(taps, *weights))


def _single_delta(tap, down_in, core, down_out, down_bias, up_in, up_out, up_bias):
    block_diagonal = torch.block_diag(*core)
    hidden = F.gelu(tap @ down_in @ block_diagonal @ down_out + down_bias)
    return hidden @ up_in @ block_diagonal @ up_out + up_bias


def stage_delta(taps: list[Tensor], weights: AdapterWeights, saved_dtype: torch.dtype | None = None) -> Tensor:
    """Sum of the deltas of all adapters of a stage.

    Args:
        taps: ``N`` tensors of frozen activations, (..., C), all of one shape and dtype, without gradient. The
            products run in their dtype; the weights keep theirs.
        weights: the ``N`` adapters.
        saved_dtype: what the backward pass keeps of the taps; ``None`` keeps them as they are. Only the gradient of
            ``down_in`` sees the rounding: the forward pass and every other gradient are exact.

    Returns:
        (..., C) in the taps' dtype, with gradient to the weights alone.
    """
    return StageDelta.apply(saved_dtype, len(taps), *taps, *weights)


def compress(tap: Tensor, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Rounds ``tap`` to ``dtype`` if that is narrower; 8-bit floats come with the scale that uses their range."""
    if dtype is None or dtype.itemsize >= tap.dtype.itemsize:
        return tap, None
    if dtype.itemsize > 1:
        return tap.to(dtype), None
    scale = tap.abs().amax().float().clamp(min=torch.finfo(torch.float32).tiny) / torch.finfo(dtype).max
    return (tap / scale).to(dtype), scale


def decompress(tap: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`compress` up to its rounding."""
    # The scale may be below what half precision can hold.
    return tap.to(dtype) if scale is None else (tap.float() * scale).to(dtype)


class StageDelta(torch.autograd.Function):
    """Hand-written :func:`reference_delta` that keeps little for the backward pass.

    Kept: each tap (compressed, for the gradient of ``P``) and its rank-space image ``z P`` of width ``W``. The
    hidden activations are recomputed from the latter, a group of adapters at a time.
    """

    @staticmethod
    def forward(ctx, saved_dtype, num_taps, *tensors):
        taps, weights = tensors[:num_taps], AdapterWeights(*tensors[num_taps:])
        shape, dtype = taps[0].shape, taps[0].dtype
        taps = [tap.reshape(-1, shape[-1]) for tap in taps]
        with torch.autocast(taps[0].device.type, enabled=False):
            cast = weights.to(dtype)
            core = _block_diagonal(cast.core)
            reduced = torch.stack([torch.mm(tap, down_in) for tap, down_in in zip(taps, cast.down_in)])
            delta = cast.up_bias.sum(0).expand_as(taps[0])
            for group in _groups(reduced, cast):
                *_, expanded = _bottleneck(reduced[group], core[group], cast.select(group))
                delta = torch.addmm(delta, _side_by_side(expanded), cast.up_out[group].flatten(0, 1))
        saved, scales = zip(*(compress(tap, saved_dtype) for tap in taps))
        ctx.num_taps, ctx.dtype = num_taps, dtype
        ctx.save_for_backward(*saved, *scales, reduced, *weights)
        return delta.reshape(shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        num_taps, saved = ctx.num_taps, ctx.saved_tensors
        taps, scales = saved[:num_taps], saved[num_taps : 2 * num_taps]
        reduced, weights = saved[2 * num_taps], AdapterWeights(*saved[2 * num_taps + 1 :])
        grad = grad.reshape(-1, grad.shape[-1]).to(ctx.dtype)
        grads = AdapterWeights(*(torch.empty_like(weight) for weight in weights))
        with torch.autocast(grad.device.type, enabled=False):
            cast = weights.to(ctx.dtype)
            core = _block_diagonal(cast.core)
            grads.up_bias.copy_(grad.sum(0).expand_as(weights.up_bias))
            for group in _groups(reduced, cast):
                grad_reduced = _group_backward(
                    grad, reduced[group], core[group], cast.select(group), grads.select(group)
                )
                members = zip(taps[group], scales[group], grads.down_in[group], grad_reduced)
                for tap, scale, grad_down_in, grad_tap_reduced in members:
                    grad_down_in.copy_(decompress(tap, scale, ctx.dtype).t() @ grad_tap_reduced)
        return (None, None, *[None] * num_taps, *grads)


def _group_backward(grad, reduced, core, weights, grads) -> Tensor:
    """Fills ``grads`` of a group of adapters but for ``down_in``; returns the gradient of ``z P``, (n, M, W)."""
    mixed, hidden, active, inner, expanded = _bottleneck(reduced, core, weights)
    num_adapters, num_tokens, width = reduced.shape
    grads.up_out.copy_((_side_by_side(expanded).t() @ grad).view_as(weights.up_out))
    grad_expanded = grad @ weights.up_out.flatten(0, 1).t()
    grad_expanded = grad_expanded.view(num_tokens, num_adapters, width).transpose(0, 1)
    grad_inner = grad_expanded @ core.mT
    grads.up_in.copy_(active.mT @ grad_inner)
    grad_hidden = torch.ops.aten.gelu_backward(grad_inner @ weights.up_in.mT, hidden)
    grads.down_bias.copy_(grad_hidden.sum(1))
    grads.down_out.copy_(mixed.mT @ grad_hidden)
    grad_mixed = grad_hidden @ weights.down_out.mT
    grad_core = inner.mT @ grad_expanded + reduced.mT @ grad_mixed
    grads.core.copy_(_diagonal_blocks(grad_core, weights.core))
    return grad_mixed @ core.mT


def _bottleneck(reduced, core, weights) -> tuple[Tensor, ...]:
    """From ``z P`` (n, M, W) to the input of ``Q'`` (n, M, W), with everything in between."""
    mixed = reduced @ core
    hidden = torch.baddbmm(weights.down_bias.unsqueeze(1), mixed, weights.down_out)
    active = F.gelu(hidden)
    inner = active @ weights.up_in
    return mixed, hidden, active, inner, inner @ core


def _groups(reduced: Tensor, weights: AdapterWeights) -> list[slice]:
    num_adapters, num_tokens, _ = reduced.shape
    adapter_bytes = max(1, num_tokens * weights.down_out.shape[-1] * reduced.element_size())
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
