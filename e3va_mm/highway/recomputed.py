"""Evaluating a cheap function again in the backward pass, in place of keeping what it computes."""

from __future__ import annotations

import torch
from torch import Tensor

from .tap_record import records_gradient, stored_dtype


def recomputed(function, limit: torch.dtype | None, state: Tensor, *parameters: Tensor) -> tuple[Tensor | None, ...]:
    """``function(state)``, by :class:`Recomputed` where gradients are recorded."""
    return Recomputed.apply(function, limit, state, *parameters) if records_gradient() else function(state)


class Recomputed(torch.autograd.Function):
    """``function(state)``, for a cheap function: only ``state`` is kept, in ``limit`` where that is narrower.

    The backward pass evaluates ``function`` again, under the autocast state of the forward pass. Plain autograd would
    keep the inputs of each of its norms, in fp32.

    Args:
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
