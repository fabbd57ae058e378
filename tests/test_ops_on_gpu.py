"""The operators that e3va_mm brings, against mmcv's CUDA kernels: values and gradients by mmcv's own wrappers."""

import importlib
from functools import partial

import pytest
import torch
from test_ops import assert_close, boxes_of, compiled, path, regions_of  # noqa: F401

from e3va_mm import ops

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')


def drawn(*shape):
    return torch.randn(*shape, device='cuda', requires_grad=True)


def with_gradients(output, *leaves):
    grad = torch.linspace(-1, 1, output.numel(), device='cuda').view_as(output)
    return [output, *torch.autograd.grad(output, leaves, grad)]


def rois_align(wrapper):
    features = drawn(2, 4, 15, 18)
    return with_gradients(wrapper.roi_align(features, regions_of(24).cuda(), (3, 5), 0.5, 0, 'avg', True), features)


def rois_pool(wrapper):
    features = drawn(2, 4, 15, 18)
    return with_gradients(wrapper.roi_pool(features, regions_of(24).cuda(), (3, 4), 0.5), features)


def focal_loss(name, weighted, wrapper):
    # Of the background, which the kernels give what lies behind the weights, there is none where there are weights.
    logits, target = drawn(20, 3), torch.arange(20, device='cuda') % (3 if weighted else 4)
    weight = torch.rand(3).cuda() if weighted else None
    return with_gradients(getattr(wrapper, name)(logits, target, 2.5, 0.3, weight, 'sum'), logits)


def convolution(wrapper):
    leaves = drawn(2, 4, 9, 11), drawn(2, 18, 9, 11), drawn(8, 4, 3, 3)
    return with_gradients(wrapper.deform_conv2d(*leaves, 1, 1), *leaves)


def modulated_convolution(wrapper):
    leaves = drawn(2, 4, 9, 11), drawn(2, 18, 9, 11), drawn(2, 9, 9, 11), drawn(8, 4, 3, 3), drawn(8)
    return with_gradients(wrapper.modulated_deform_conv2d(*leaves, 1, 1, 1, 1, 1), *leaves)


def attention(wrapper):
    sizes, starts = torch.tensor([(6, 8), (3, 4)], device='cuda'), torch.tensor([0, 48], device='cuda')
    leaves = drawn(2, 60, 4, 8), drawn(2, 10, 4, 2, 2, 2), drawn(2, 10, 4, 2, 2)
    value, locations, weights = leaves
    output = wrapper.MultiScaleDeformableAttnFunction.apply(value, sizes, starts, locations, weights, 64)
    return with_gradients(output, *leaves)


def suppression(kind, wrapper):
    boxes, scores = (part.cuda() for part in boxes_of(400))
    idxs = torch.arange(400, device='cuda') % 5
    return wrapper.batched_nms(boxes, scores, idxs, dict(type=kind, iou_threshold=0.3))


@pytest.mark.parametrize(
    ('module', 'call'),
    [
        ('roi_align', rois_align),
        ('roi_pool', rois_pool),
        ('focal_loss', partial(focal_loss, 'sigmoid_focal_loss', False)),
        ('focal_loss', partial(focal_loss, 'sigmoid_focal_loss', True)),
        ('focal_loss', partial(focal_loss, 'softmax_focal_loss', True)),
        ('deform_conv', convolution),
        ('modulated_deform_conv', modulated_convolution),
        ('multi_scale_deform_attn', attention),
        ('nms', partial(suppression, 'nms')),
        ('nms', partial(suppression, 'soft_nms')),
    ],
)
def test_as_the_cuda_kernels(compiled, monkeypatch, module, call):  # noqa: F811
    wrapper, results = importlib.import_module(f'mmcv.ops.{module}'), []
    for extension in (ops, compiled):
        monkeypatch.setattr(wrapper, 'ext_module', extension)
        torch.manual_seed(0)
        results.append(call(wrapper))
    for actual, expected in zip(*results):
        assert_close(actual, expected, atol=5e-5, rtol=1e-4)
