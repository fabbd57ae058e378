"""The feature pyramid of plain ViTs."""

import pytest
import torch
from mmengine.registry import MODELS

import e3va_mm  # noqa: F401  (registers the neck)

PYRAMID = dict(type='SimpleFeaturePyramid', in_channels=[32] * 4, out_channels=16, num_outs=5)


@pytest.mark.parametrize('given', [1, 4])
def test_pyramid(given):
    neck = MODELS.build({**PYRAMID, 'in_channels': [32] * given})
    levels = neck([torch.randn(2, 32, 5, 7, requires_grad=True) for _ in range(given)])
    assert [tuple(level.shape) for level in levels] == [
        (2, 16, 20, 28), (2, 16, 10, 14), (2, 16, 5, 7), (2, 16, 3, 4), (2, 16, 2, 2)
    ]  # fmt: skip
    sum(level.sum() for level in levels).backward()
    assert all(parameter.grad is not None for parameter in neck.parameters())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(scales=(3, 1)), 'scales must be'),
        (dict(in_channels=[32] * 3), 'one entry or 4'),
        (dict(num_outs=2), 'num_outs=2'),
    ],
)
def test_bad_pyramids(options, message):
    with pytest.raises(ValueError, match=message):
        MODELS.build({**PYRAMID, **options})
