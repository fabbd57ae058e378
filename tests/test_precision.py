"""Precision: a reduced frozen forward, its default, and autocast around the whole backbone."""

import pytest
import torch
from conftest import e3va, outputs_of_stock, stir, swin
from mmengine.registry import MODELS


@pytest.mark.parametrize(('dtype', 'error'), [('bfloat16', 0.03), ('float16', 0.01)])
def test_frozen_dtype(dtype, error, weights):
    backbone = swin(init_cfg=dict(type='Pretrained', checkpoint=weights))
    exact, reduced = e3va(backbone), e3va(backbone, frozen_dtype=dtype)
    block = reduced.backbone.stages[0].blocks[0]
    matrices = [
        *block.attn.w_msa.qkv.parameters(),
        *block.ffn.parameters(),
        reduced.backbone.patch_embed.projection.weight,
    ]
    assert {parameter.dtype for parameter in matrices} == {getattr(torch, dtype)}
    others = [block.norm1.bias, block.attn.w_msa.relative_position_bias_table]
    assert {parameter.dtype for parameter in others} == {torch.float32}
    images = torch.randn(2, 3, 64, 64)
    for output, expected in zip(reduced(images), exact(images)):
        assert output.dtype == torch.float32
        assert (output - expected).norm() < error * expected.norm()
    assert torch.equal(exact.base_fingerprint(), reduced.base_fingerprint())


@pytest.mark.parametrize(
    ('capability', 'expected'), [(None, None), ((7, 5), None), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_default_frozen_dtype(capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda: capability)
    assert MODELS.build(dict(type='E3VABackbone', backbone=swin())).frozen_dtype is expected
    assert e3va(frozen_dtype=None).frozen_dtype is None


def test_under_autocast():
    model = stir(e3va())
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        outputs = model(images)
        stock = outputs_of_stock(model, images)
    assert [output.dtype for output in outputs] == [output.dtype for output in stock]
    assert all((output - exact).norm() < 0.05 * exact.norm() for output, exact in zip(outputs, expected))
    sum(output.square().sum() for output in outputs).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_amp_on_cuda(dtype):
    model = stir(e3va()).cuda()
    images = torch.randn(2, 3, 64, 64, device='cuda')
    expected = model(images)
    with torch.autocast('cuda', dtype=dtype):
        outputs = model(images)
    assert all((output - exact).norm() < 0.05 * exact.norm() for output, exact in zip(outputs, expected))
    sum(output.square().sum() for output in outputs).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters() if parameter.requires_grad)
