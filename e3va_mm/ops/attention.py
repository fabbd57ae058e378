"""Multi-scale deformable attention (Deformable DETR, https://arxiv.org/abs/2010.04159).

A query's output is a weighted sum of pixels, four around each sampled point: an embedding bag, which never holds the
sampled values.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import corners, gradients, wide, without_autocast


def _attend(value: Tensor, locations: Tensor, weights: Tensor, shapes: Tensor, starts: Tensor) -> Tensor:
    batch, keys, heads, dims = value.shape
    height, width = (size[:, None] for size in shapes.unbind(1))  # (levels, 1): for all points
    index, share = corners(locations[..., 1] * height - 0.5, locations[..., 0] * width - 0.5, height, width)
    image = torch.arange(batch, device=value.device).view(-1, 1, 1, 1, 1, 1)
    head = torch.arange(heads, device=value.device).view(-1, 1, 1, 1)
    row = ((image * keys + starts.view(-1, 1, 1) + index) * heads + head).flatten(3)
    share = (share * weights[..., None]).flatten(3)
    bags = F.embedding_bag(
        row.flatten(0, 2), value.reshape(-1, dims), mode='sum', per_sample_weights=share.flatten(0, 2)
    )
    return bags.view(batch, -1, heads * dims)


@without_autocast
def ms_deform_attn_forward(value, shapes, starts, locations, weights, im2col_step) -> Tensor:
    """value: (B, keys, heads, C); locations: (B, queries, heads, levels, points, 2) → (B, queries, heads · C)."""
    return _attend(wide(value), wide(locations), wide(weights), shapes, starts).to(value.dtype)


@without_autocast
def ms_deform_attn_backward(
    value, shapes, starts, locations, weights, grad_output, grad_value, grad_locations, grad_weights, im2col_step
) -> None:
    """Writes the three gradients."""
    grads = gradients(lambda *inputs: _attend(*inputs, shapes, starts), [value, locations, weights], grad_output)
    for target, grad in zip((grad_value, grad_locations, grad_weights), grads):
        target.copy_(grad)
