import pytest
import torch
from conftest import e3va, swin
from mmengine.registry import MODELS

from e3va_mm.families import window_attention
from e3va_mm.families.window_attention import FusedWindowAttention, window_layout


def attention(shift, scope='mmseg', window=7):
    torch.manual_seed(0)
    module = MODELS.build(swin(scope, window_size=window, num_heads=(2, 2, 4, 8))).stages[0].blocks[shift].attn.eval()
    # Larger than any initialisation, so that scores, bias and mask all matter.
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return module.double()


def fused(module, tokens, size):
    return FusedWindowAttention(module)(tokens, size)


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
@pytest.mark.parametrize('shift', [0, 1], ids=['regular', 'shifted'])
@pytest.mark.parametrize('size', [(14, 14), (7, 7), (5, 3), (1, 20), (16, 23)])
def test_equals_the_stock_module(scope, shift, size):
    module = attention(shift, scope)
    tokens = torch.randn(3, size[0] * size[1], 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(module, tokens, size), module(tokens, size))


@pytest.mark.parametrize('window', [4, 12])
def test_other_windows(window):
    module, tokens = attention(1, window=window), torch.randn(2, 17 * 13, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(module, tokens, (17, 13)), module(tokens, (17, 13)))


def test_more_windows_than_a_kernel_takes(monkeypatch):
    monkeypatch.setattr(window_attention, '_MOST_WINDOWS', 5)
    window_layout.cache_clear()
    module, tokens = attention(1), torch.randn(4, 30 * 30, 12, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(fused(module, tokens, (30, 30)), module(tokens, (30, 30)))
    window_layout.cache_clear()


def test_non_contiguous_tokens():
    module, tokens = attention(1), torch.randn(81, 2, 12, dtype=torch.float64).transpose(0, 1)
    with torch.no_grad():
        torch.testing.assert_close(fused(module, tokens, (9, 9)), module(tokens, (9, 9)))


def test_a_changed_bias_table_is_noticed():
    model, images = e3va(), torch.randn(1, 3, 64, 64)
    before = model(images)
    with torch.no_grad():
        model.backbone.stages[0].blocks[0].attn.w_msa.relative_position_bias_table.normal_()
    stock = MODELS.build(swin())
    stock.load_state_dict(model.backbone.state_dict())
    stock.eval()
    after, expected = model(images), stock(images)
    assert not torch.allclose(before[0], after[0])
    torch.testing.assert_close(after[0], expected[0], rtol=0, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize(('dtype', 'error'), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize('shift', [0, 1], ids=['regular', 'shifted'])
def test_on_cuda(dtype, error, shift):
    module = MODELS.build(swin(embed_dims=64, num_heads=(2, 4, 8, 16))).stages[0].blocks[shift].attn.eval().cuda()
    tokens = torch.randn(2, 33 * 50, 64, device='cuda')
    with torch.no_grad():
        expected = module(tokens, (33, 50))
        output = fused(module.to(dtype), tokens.to(dtype), (33, 50))
    assert (output - expected).norm() < error * expected.norm()
