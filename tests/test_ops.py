"""The operators that e3va_mm brings, against those of a compiled mmcv, its wrappers, and the formulas."""

import importlib
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from e3va_mm import ops
from e3va_mm.ops import common


@pytest.fixture(scope='module')
def compiled():
    extension = importlib.import_module('mmcv._ext')
    if isinstance(extension, ops._Operators):
        pytest.skip('mmcv has no compiled operators to compare with')
    return extension


@pytest.fixture(params=['torchvision', 'plain'], autouse=True)
def path(request, monkeypatch):
    """Both ways to compute; torchvision's operators are not registered beside a CPU-only torch."""
    if request.param == 'plain':
        monkeypatch.setattr(common, '_has_kernel', lambda op, device: False)
    elif not common._has_kernel('roi_align', 'CPU'):
        pytest.skip("torchvision's operators are not registered beside this torch")


assert_close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)


def boxes_of(count, side=64.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * side
    size = torch.rand(count, 2, generator=generator) * side / 3
    return torch.cat((corner, corner + size), 1), torch.rand(count, generator=generator)


CROWDS = {
    'none': boxes_of(0),
    'one': boxes_of(1),
    'many': boxes_of(1500),
    'ties': (boxes_of(60)[0].round() + torch.tensor([0, 0, 1, 1]), boxes_of(60)[1].mul(4).round() / 4),
    'same': (torch.tensor([[1.0, 1.0, 9.0, 9.0]]).repeat(5, 1), torch.full((5,), 0.5)),
    'empty': (torch.tensor([[3.0, 3.0, 3.0, 3.0]]).repeat(4, 1), torch.tensor([0.1, 0.4, 0.2, 0.3])),
    # Overlaps of exactly 0.6, and of 0.5.
    'threshold': (
        torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 6.0, 10.0], [0.0, 0.0, 3.0, 10.0]]),
        torch.tensor([0.9, 0.8, 0.7]),
    ),
}


@pytest.mark.parametrize('crowd', CROWDS)
@pytest.mark.parametrize('threshold', [0.1, 0.5, 0.6])
@pytest.mark.parametrize('offset', [0, 1])
def test_nms(compiled, crowd, threshold, offset):
    boxes, scores = CROWDS[crowd]
    args = dict(iou_threshold=threshold, offset=offset)
    # The compiled operator takes equal scores in any order; here the first of them comes first.
    apart = scores - torch.arange(len(scores)) * 1e-5 if crowd in ('ties', 'same') else scores
    assert ops.nms(boxes, scores, **args).tolist() == compiled.nms(boxes, apart, **args).tolist()


def test_nms_in_half_precision():
    boxes, scores = boxes_of(200)
    half = boxes.half(), scores.half()
    assert ops.nms(*half, 0.5, 0).tolist() == ops.nms(half[0].float(), half[1].float(), 0.5, 0).tolist()


@pytest.mark.parametrize('classes', [1, 5])
@pytest.mark.parametrize('kind', ['nms', 'soft_nms'])
def test_batched_nms(compiled, monkeypatch, kind, classes):
    wrapper = importlib.import_module('mmcv.ops.nms')
    boxes, scores = boxes_of(400)
    idxs = torch.arange(400) % classes
    results = []
    for extension in (compiled, ops):
        monkeypatch.setattr(wrapper, 'ext_module', extension)
        results.append(wrapper.batched_nms(boxes, scores, idxs, dict(type=kind, iou_threshold=0.3)))
    assert results[0][1].tolist() == results[1][1].tolist()
    assert_close(results[1][0], results[0][0])


@pytest.mark.parametrize('crowd', [name for name in CROWDS if name not in ('many', 'empty')])
@pytest.mark.parametrize('method', [0, 1, 2])
@pytest.mark.parametrize('offset', [0, 1])
def test_softnms(compiled, crowd, method, offset):
    results = []
    for extension in (ops, compiled):
        boxes, scores = CROWDS[crowd]
        dets = torch.zeros(len(boxes), 5)
        args = dict(iou_threshold=0.3, sigma=0.5, min_score=0.1, method=method, offset=offset)
        inds = extension.softnms(boxes, scores, dets, **args)
        results.append((inds, dets[: len(inds)]))
    assert results[0][0].tolist() == results[1][0].tolist()
    assert_close(results[0][1], results[1][1])


def test_softnms_of_empty_boxes_keeps_their_scores():
    """Their overlap is no number, which the compiled operator makes of their scores too."""
    boxes, scores = CROWDS['empty']
    dets = torch.zeros(4, 5)
    assert ops.softnms(boxes, scores, dets, 0.3, 0.5, 0.05, method=2, offset=0).tolist() == [1, 3, 2, 0]
    assert dets[:, 4].tolist() == scores.sort(descending=True).values.tolist()


def regions_of(count, seed=0):
    """Some reach outside the image, some are empty."""
    boxes = boxes_of(count, side=40.0, seed=seed)[0] - 6
    boxes[: count // 8, 2:] = boxes[: count // 8, :2]
    return torch.cat((torch.arange(count)[:, None] % 2, boxes), 1)


def aligned(extension, features, rois, grad, **args):
    output, grad_input = torch.zeros(len(rois), features.shape[1], 3, 5), torch.zeros_like(features)
    args = dict(aligned_height=3, aligned_width=5, spatial_scale=0.5, pool_mode=1, **args)
    unused = torch.zeros(0)
    extension.roi_align_forward(features, rois, output, unused, unused, **args)
    extension.roi_align_backward(grad, rois, unused, unused, grad_input, **args)
    return output, grad_input


@pytest.mark.parametrize('count', [0, 1, 24])
@pytest.mark.parametrize('sampling_ratio', [0, 2])
@pytest.mark.parametrize('align', [True, False])
def test_roi_align(compiled, monkeypatch, count, sampling_ratio, align):
    monkeypatch.setattr('e3va_mm.ops.rois._CORNERS', 3000)  # in several parts
    features, rois, grad = torch.randn(2, 4, 15, 18), regions_of(count), torch.randn(count, 4, 3, 5)
    args = dict(sampling_ratio=sampling_ratio, aligned=align)
    for actual, expected in zip(*(aligned(extension, features, rois, grad, **args) for extension in (ops, compiled))):
        assert_close(actual, expected)


def test_roi_align_by_the_maximum_is_refused():
    with pytest.raises(NotImplementedError, match=r"pool_mode='max'.*MMCV_OPS=build"):
        ops.roi_align_forward(torch.zeros(1, 1, 4, 4), regions_of(1), *[torch.zeros(1)] * 3, 1, 1, 1.0, 0, 0, True)


def pooled_by_loops(image, region, size, scale):
    """RoIPool of one region as it is written down: bins from floor to ceil, clipped; nought of an empty one."""
    x1, y1 = region[:2] * scale
    width, height = ((region[2:] + 1) * scale - torch.stack((x1, y1))) / torch.tensor(size[::-1])
    result = torch.zeros(len(image), *size)
    for i in range(size[0]):
        for j in range(size[1]):
            rows = slice(
                *(int(v.clamp(0, image.shape[1])) for v in ((i * height + y1).floor(), ((i + 1) * height + y1).ceil()))
            )
            columns = slice(
                *(int(v.clamp(0, image.shape[2])) for v in ((j * width + x1).floor(), ((j + 1) * width + x1).ceil()))
            )
            part = image[:, rows, columns].flatten(1)
            if part.shape[1] and width > 0 and height > 0:
                result[:, i, j] = part.max(1).values
    return result


def test_roi_pool():
    features, rois = torch.randn(2, 4, 15, 18, requires_grad=True), regions_of(24)
    expected = torch.stack([pooled_by_loops(features[int(roi[0])], roi[1:], (3, 4), 0.5) for roi in rois])
    output, argmax = torch.zeros(24, 4, 3, 4), torch.zeros(24, 4, 3, 4, dtype=torch.int)
    args = dict(pooled_height=3, pooled_width=4, spatial_scale=0.5)
    ops.roi_pool_forward(features.detach(), rois, output, argmax, **args)
    assert_close(output, expected.detach())
    assert (argmax == -1).any()
    grad, grad_input = torch.randn_like(output), torch.zeros(2, 4, 15, 18)
    ops.roi_pool_backward(grad, rois, argmax, grad_input, **args)
    assert_close(grad_input, torch.autograd.grad(expected, features, grad)[0])


def test_roi_pool_of_no_regions():
    output, argmax = torch.zeros(0, 4, 3, 4), torch.zeros(0, 4, 3, 4, dtype=torch.int)
    args = dict(pooled_height=3, pooled_width=4, spatial_scale=0.5)
    ops.roi_pool_forward(torch.randn(1, 4, 9, 9), torch.zeros(0, 5), output, argmax, **args)
    grad_input = torch.ones(1, 4, 9, 9)
    ops.roi_pool_backward(output, torch.zeros(0, 5), argmax, grad_input, **args)
    assert (grad_input == 1).all()


@pytest.fixture
def wrappers(monkeypatch):
    """A module of mmcv.ops, on the operators of e3va_mm."""

    def load(name):
        module = importlib.import_module(f'mmcv.ops.{name}')
        monkeypatch.setattr(module, 'ext_module', ops)
        return module

    return load


@pytest.mark.parametrize('classes', [1, 3])
@pytest.mark.parametrize('weighted', [False, True])
def test_sigmoid_focal_loss(wrappers, classes, weighted):
    wrapper = wrappers('focal_loss')
    logits = (torch.randn(20, classes) * 4).requires_grad_()
    target = torch.arange(20) % (classes + 1)  # the last is the background
    weight = torch.rand(classes) if weighted else None
    each = F.one_hot(target, classes + 1)[:, :classes].float()
    p = logits.sigmoid()
    p = p * each + (1 - p) * (1 - each)
    expected = (0.3 * each + 0.7 * (1 - each)) * (1 - p) ** 2.5 * -p.log()
    if weighted:
        expected = expected * torch.cat((weight, torch.ones(1)))[target][:, None]
    actual = wrapper.sigmoid_focal_loss(logits, target, 2.5, 0.3, weight, 'sum')
    assert_close(actual, expected.sum())
    assert_close(torch.autograd.grad(actual, logits)[0], torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize('weighted', [False, True])
def test_softmax_focal_loss(wrappers, weighted):
    wrapper = wrappers('focal_loss')
    logits, target = (torch.randn(20, 3) * 2).requires_grad_(), torch.arange(20) % 3
    target[5] = -1  # left out
    weight = torch.rand(3) if weighted else None
    p = logits.softmax(1)[torch.arange(20), target]
    share = (target >= 0) * (weight[target] if weighted else 1)
    expected = (0.3 * (1 - p) ** 2.5 * -p.log() * share).sum() / 20
    actual = wrapper.softmax_focal_loss(logits, target, 2.5, 0.3, weight, 'mean')
    assert_close(actual, expected)
    assert_close(torch.autograd.grad(actual, logits)[0], torch.autograd.grad(expected, logits)[0])


@pytest.mark.parametrize('reach', [60.0, 400.0])
def test_losses_of_extreme_logits_are_finite(wrappers, reach):
    logits = torch.tensor([[-reach, reach, 0.0]], requires_grad=True)
    for name in ('sigmoid_focal_loss', 'softmax_focal_loss'):
        loss = getattr(wrappers('focal_loss'), name)(logits, torch.tensor([0]))
        assert loss.isfinite() and torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize('modulated', [False, True])
@pytest.mark.parametrize(
    'geometry', [(1, 1, 1, 1, 1), ((2, 1), (0, 2), (1, 2), 2, 1), (1, 1, 1, 1, 2), (2, 1, 1, 4, 4)]
)
def test_deform_conv(compiled, monkeypatch, modulated, geometry):
    wrapper = importlib.import_module('mmcv.ops.' + ('modulated_deform_conv' if modulated else 'deform_conv'))
    stride, padding, dilation, groups, offset_groups = geometry
    features, weight, bias = torch.randn(2, 4, 9, 11), torch.randn(8, 4 // groups, 3, 2), torch.randn(8)
    size = F.conv2d(features, weight, None, stride, padding, dilation, groups).shape[2:]
    offset, mask = torch.randn(2, offset_groups * 12, *size) * 3, torch.rand(2, offset_groups * 6, *size)
    inputs = [features, offset, *([mask, weight, bias] if modulated else [weight])]
    name = 'modulated_deform_conv2d' if modulated else 'deform_conv2d'
    assert_same_convolution(compiled, monkeypatch, wrapper, name, inputs, geometry)


def test_modulated_deform_conv_reads_offsets_of_another_size_as_they_lie(compiled, monkeypatch):
    """DyHead gives those of a level to the convolution of a smaller one."""
    wrapper = importlib.import_module('mmcv.ops.modulated_deform_conv')
    offset, mask = torch.randn(2, 18, 6, 12), torch.rand(2, 9, 6, 12)
    inputs = [torch.randn(2, 4, 3, 6), offset, mask, torch.randn(8, 4, 3, 3), torch.randn(8)]
    assert_same_convolution(compiled, monkeypatch, wrapper, 'modulated_deform_conv2d', inputs, (1, 1, 1, 1, 1))


def assert_same_convolution(compiled, monkeypatch, wrapper, name, inputs, geometry):
    """Output, and gradients of all inputs."""
    results = []
    for extension in (ops, compiled):
        monkeypatch.setattr(wrapper, 'ext_module', extension)
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = getattr(wrapper, name)(*leaves, *geometry)
        grad = torch.linspace(-1, 1, output.numel()).view_as(output)
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    for actual, expected in zip(*results):
        assert_close(actual, expected, atol=2e-5)  # sums of up to 200 products


@pytest.mark.parametrize('shapes', [[(5, 7)], [(6, 8), (3, 4), (1, 1)]])
def test_ms_deform_attn(wrappers, shapes):
    wrapper = wrappers('multi_scale_deform_attn')
    sizes = torch.tensor(shapes)
    starts = torch.cat((sizes.new_zeros(1), sizes.prod(1).cumsum(0)[:-1]))
    value = torch.randn(2, int(sizes.prod(1).sum()), 3, 4, requires_grad=True)
    locations = (torch.rand(2, 10, 3, len(shapes), 2, 2) * 1.4 - 0.2).requires_grad_()  # some outside
    weights = torch.rand(2, 10, 3, len(shapes), 2, requires_grad=True)
    actual = wrapper.MultiScaleDeformableAttnFunction.apply(value, sizes, starts, locations, weights, 64)
    expected = wrapper.multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    assert_close(actual, expected)
    grad = torch.randn_like(actual)
    inputs = [value, locations, weights]
    for one, other in zip(torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
        assert_close(one, other)


def test_masked_conv(wrappers):
    features, weight, bias = torch.randn(1, 3, 7, 9), torch.randn(5, 3, 3, 3), torch.randn(5)
    mask = torch.rand(1, 7, 9) > 0.6
    actual = wrappers('masked_conv').masked_conv2d(features, mask.float(), weight, bias, 1)
    assert_close(actual, F.conv2d(features, weight, bias, padding=1) * mask)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_only_at_the_ends(dtype):
    """Under autocast too, which would have matrix products rounded inside."""
    features, rois, grad = torch.randn(2, 4, 15, 18).to(dtype), regions_of(8), torch.randn(8, 4, 3, 5).to(dtype)
    args = dict(sampling_ratio=0, aligned=True)
    expected = aligned(ops, features.float(), rois, grad.float(), **args)
    with torch.autocast('cpu', dtype):
        actual = aligned(ops, features, rois, grad, **args)
    assert_close(actual[0], expected[0])
    assert_close(actual[1], expected[1].to(dtype))


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_deform_conv_in_half_precision(wrappers, dtype):
    layer = wrappers('deform_conv').deform_conv2d
    inputs = [torch.randn(2, 4, 6, 6), torch.randn(2, 18, 6, 6), torch.randn(8, 4, 3, 3)]
    leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
    exact = [leaf.detach().float().requires_grad_() for leaf in leaves]
    with torch.autocast('cpu', dtype):
        output = layer(*leaves, 1, 1)
    expected = layer(*exact, 1, 1)
    assert output.dtype is dtype
    assert_close(output, expected.to(dtype))
    grads = torch.autograd.grad(output.float().sum(), leaves), torch.autograd.grad(expected.sum(), exact)
    for actual, reference in zip(*grads):
        assert_close(actual, reference.to(dtype))


def test_an_operator_that_is_not_brought_says_so():
    stand_in = ops._Operators('mmcv._ext')
    with pytest.raises(NotImplementedError, match=r'operator carafe_forward .*MMCV_OPS=build.*C\+\+ compiler'):
        stand_in.carafe_forward(torch.zeros(1))
    assert not hasattr(stand_in, '__path__')


def test_a_compiled_mmcv_is_left_alone(compiled):
    assert not ops.stand_in()
    assert sys.modules['mmcv._ext'] is compiled
