"""Focal loss (https://arxiv.org/abs/1708.02002): values and gradients for each entry; the callers sum them.

A weight of no entries is none. The target of the background is the number of classes; it has no weight of its own.
"""

import torch
from torch import Tensor

from .common import wide


def _log(probability: Tensor) -> Tensor:
    return probability.clamp(min=torch.finfo(torch.float32).tiny).log()


def _weigh(values: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    if not weight.numel():
        return values
    each = torch.cat((weight, weight.new_ones(1)))[target.clamp(max=len(weight))].to(values.dtype)
    return values * each.view(-1, *[1] * (values.ndim - 1))


def _is_target(target: Tensor, num_classes: int) -> Tensor:
    return target[:, None] == torch.arange(num_classes, device=target.device)


def sigmoid_focal_loss_forward(logits, target, weight, output, gamma, alpha) -> None:
    """logits, output: (N, classes)."""
    p = wide(logits).sigmoid()
    loss = torch.where(
        _is_target(target, p.shape[1]),
        -alpha * (1 - p) ** gamma * _log(p),
        -(1 - alpha) * p**gamma * _log(1 - p),
    )
    output.copy_(_weigh(loss, weight, target))


def sigmoid_focal_loss_backward(logits, target, weight, grad_input, gamma, alpha) -> None:
    """logits, grad_input: (N, classes)."""
    p = wide(logits).sigmoid()
    grad = torch.where(
        _is_target(target, p.shape[1]),
        -alpha * (1 - p) ** gamma * (1 - p - gamma * p * _log(p)),
        -(1 - alpha) * p**gamma * (gamma * (1 - p) * _log(1 - p) - p),
    )
    grad_input.copy_(_weigh(grad, weight, target))


def softmax_focal_loss_forward(probabilities, target, weight, output, gamma, alpha) -> None:
    """probabilities: (N, classes), after the softmax; output: (N,). A negative target is left out."""
    p, counts = _of_target(probabilities, target)
    loss = -alpha * (1 - p) ** gamma * _log(p) * counts
    output.copy_(_weigh(loss, weight, target.clamp(min=0)))


def softmax_focal_loss_backward(probabilities, target, weight, buff, grad_input, gamma, alpha) -> None:
    """Writes the gradient for the logits; buff, (N,), is mmcv's for what a row's entries share."""
    p, counts = _of_target(probabilities, target)
    shared = alpha * (gamma * (1 - p) ** (gamma - 1) * p * _log(p) - (1 - p) ** gamma) * counts
    buff.copy_(_weigh(shared, weight, target.clamp(min=0)))
    is_target = _is_target(target, probabilities.shape[1])
    grad_input.copy_(wide(buff)[:, None] * (is_target.to(p.dtype) - wide(probabilities)))


def _of_target(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return wide(probabilities).gather(1, target.clamp(min=0)[:, None])[:, 0], target >= 0
