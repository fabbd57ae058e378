"""Deformable convolution (https://arxiv.org/abs/1703.06211, and with a mask https://arxiv.org/abs/1811.11168).

Names of arguments are mmcv's, whose wrappers pass them by name; the buffers that its kernels fill stay unused.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .common import corners, gradients, torchvision_has, wide, without_autocast

Pair = tuple[int, int]


def _convolve(
    features: Tensor, offset: Tensor, weight: Tensor, mask: Tensor | None, stride: Pair, pad: Pair, dilation: Pair,
    groups: int, offset_groups: int,
) -> Tensor:  # fmt: skip
    """features: (B, C, H, W); offset: (B, offset_groups · kernel · 2, H', W'), y before x; mask: half its channels."""
    if torchvision_has('deform_conv2d', features):
        use_mask = mask is not None
        mask = mask if use_mask else features.new_zeros(len(features), 1)
        bias = features.new_zeros(len(weight))
        tensors = [tensor.contiguous() for tensor in (features, weight, offset, mask, bias)]
        return torch.ops.torchvision.deform_conv2d(*tensors, *stride, *pad, *dilation, groups, offset_groups, use_mask)
    patches = _patches(features, offset, mask, weight.shape[2:], stride, pad, dilation, offset_groups)
    kernels = weight.reshape(groups, len(weight) // groups, -1)
    result = kernels @ patches.reshape(len(features), groups, kernels.shape[-1], -1)
    return result.reshape(len(features), len(weight), *offset.shape[2:])


def _patches(features, offset, mask, kernel: Pair, stride: Pair, pad: Pair, dilation: Pair, offset_groups) -> Tensor:
    """What each output sees: (B, C, kernel, H' · W')."""
    batch, channels, height, width = features.shape
    rows, columns = (
        torch.arange(size, device=features.device) * step - before
        for size, step, before in zip(offset.shape[2:], stride, pad)
    )
    tap_rows, tap_columns = (torch.arange(size, device=features.device) * step for size, step in zip(kernel, dilation))
    offset = offset.view(batch, offset_groups, *kernel, 2, *offset.shape[2:])
    y = offset[:, :, :, :, 0] + tap_rows.view(-1, 1, 1, 1) + rows.view(-1, 1)
    x = offset[:, :, :, :, 1] + tap_columns.view(-1, 1, 1) + columns
    index, share = corners(y, x, height, width)
    if mask is not None:
        share = share * mask.view_as(y)[..., None]
    # A row a pixel of each image and group of channels, which a bag of four sums.
    table = features.view(batch * offset_groups, channels // offset_groups, -1).transpose(1, 2)
    start = torch.arange(len(table), device=features.device).view(-1, 1, 1) * height * width
    index = index.view(len(table), -1, 4) + start
    bags = F.embedding_bag(
        index.flatten(0, 1), table.flatten(0, 1), mode='sum', per_sample_weights=share.reshape(-1, 4)
    )
    bags = bags.view(len(table), -1, channels // offset_groups).transpose(1, 2)
    return bags.reshape(batch, channels, kernel[0] * kernel[1], -1)


def _plain_geometry(kW, kH, dW, dH, padW, padH, dilationW, dilationH, group, deformable_group, im2col_step) -> tuple:
    return (dH, dW), (padH, padW), (dilationH, dilationW), group, deformable_group


@without_autocast
def deform_conv_forward(input, weight, offset, output, columns, ones, **geometry) -> None:
    """Writes output."""
    output.copy_(_convolve(wide(input), wide(offset), wide(weight), None, *_plain_geometry(**geometry)))


@without_autocast
def deform_conv_backward_input(
    input, offset, grad_output, grad_input, grad_offset, weight, columns, **geometry
) -> None:
    """Writes grad_input and grad_offset."""
    fixed = wide(weight), None, *_plain_geometry(**geometry)
    grads = gradients(lambda features, shift: _convolve(features, shift, *fixed), [input, offset], grad_output)
    grad_input.copy_(grads[0])
    grad_offset.copy_(grads[1])


@without_autocast
def deform_conv_backward_parameters(input, offset, grad_output, grad_weight, columns, ones, scale, **geometry) -> None:
    """Adds to grad_weight. The kernels are not given, nor needed: the result is linear in them."""
    fixed = None, *_plain_geometry(**geometry)
    (grad,) = gradients(
        lambda kernels: _convolve(wide(input), wide(offset), kernels, *fixed), [grad_weight], grad_output
    )
    grad_weight.add_(grad.to(grad_weight.dtype), alpha=scale)


def _modulated_geometry(
    kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w, group, deformable_group, with_bias
) -> tuple:
    return (stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group


def _convolve_modulated(features, offset, weight, mask, size: Pair, geometry: dict) -> Tensor:
    """As kernels read offset and mask: where these are of another size (DyHead's), their memory as it lies."""
    offset, mask = (
        tensor.flatten(1)[:, : tensor.shape[1] * size[0] * size[1]].reshape(*tensor.shape[:2], *size)
        for tensor in (offset, mask)
    )
    return _convolve(features, offset, weight, mask, *_modulated_geometry(**geometry))


@without_autocast
def modulated_deform_conv_forward(input, weight, bias, ones, offset, mask, output, columns, **geometry) -> None:
    """Writes output."""
    tensors = [wide(tensor) for tensor in (input, offset, weight, mask)]
    result = _convolve_modulated(*tensors, output.shape[2:], geometry)
    output.copy_(result + wide(bias)[:, None, None] if geometry['with_bias'] else result)


@without_autocast
def modulated_deform_conv_backward(
    input, weight, bias, ones, offset, mask, columns,
    grad_input, grad_weight, grad_bias, grad_offset, grad_mask, grad_output, **geometry,
) -> None:  # fmt: skip
    """Writes the five gradients."""
    fixed = grad_output.shape[2:], geometry
    inputs = [input, offset, weight, mask]
    grads = gradients(lambda *tensors: _convolve_modulated(*tensors, *fixed), inputs, grad_output)
    for target, grad in zip((grad_input, grad_offset, grad_weight, grad_mask), grads):
        target.copy_(grad)
    if geometry['with_bias']:
        grad_bias.copy_(wide(grad_output).sum((0, 2, 3)))
