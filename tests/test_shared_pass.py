"""One frozen pass for several wrappers of one base, of every kind of family; other bases are named."""

import contextlib
import re

import pytest
import torch
from conftest import MIT, e3va, images, stir, swin, timm_features
from torch.testing import assert_close

from e3va_mm.backbones.shared_pass import SharedPass


def pair(backbone, other=None, **options):
    """Two wrappers with the same weights, as far as they have the same, and other highways."""
    one, two = e3va(backbone), e3va(other or backbone, **options)
    two.backbone.load_state_dict(one.backbone.state_dict(), strict=False)
    for wrapper in (one, two):
        wrapper.family.remember()
        wrapper._base_record.clear()
        stir(wrapper).eval()
    return one, two


def refusal(one, two) -> str:
    shared = SharedPass('cpu')
    shared.join('one', one)
    with pytest.raises(ValueError) as raised:
        shared.join('two', two)
    assert [*shared.members] == ['one']
    return str(raised.value)


def test_another_base_is_named():
    one, two = pair(swin())
    with torch.no_grad():
        two.backbone.stages[1].blocks[0].attn.w_msa.qkv.bias.add_(1)
    message = r"'two' is not that of 'one': 1 of its \d+ frozen tensors have other values: stages.1.blocks.0.*qkv.bias"
    assert re.search(message, refusal(one, two))
    assert 'frozen_dtype is torch.bfloat16, not None' in refusal(*pair(swin(), frozen_dtype='bfloat16'))
    assert 'MixVisionTransformer with other blocks than that SwinTransformer' in refusal(*pair(swin(), MIT))
    # Published norms are in the path of a MiT.
    one, two = pair(MIT)
    with torch.no_grad():
        two.family.replacements()['layers.1.2'].weight.add_(1)
    assert 'have other values: layers.1.2' in refusal(one, two)


def test_other_settings_with_the_same_weights_are_refused():
    one, two = pair(swin(), swin(act_cfg=dict(type='ReLU')))
    assert 'with the same weights, map 0 comes out otherwise' in refusal(one, two)


RESNET = dict(type='mmdet.ResNet', depth=50, base_channels=8, out_indices=(0, 1, 2))
MOBILENET = dict(type='mmdet.MobileNetV2', widen_factor=0.25)
CONVNEXT = timm_features('convnext_base')


@pytest.mark.parametrize(
    ('backbone', 'other', 'options'),
    [
        (swin('mmdet', out_indices=(1, 2)), swin(), dict(mixer=dict(width=4), graph_stages=2)),
        (swin(), swin('mmdet', out_indices=(0, 1)), dict(adapter=dict(rank=4))),
        (MIT, {**MIT, 'out_indices': (1, 2)}, dict(mixer=dict(width=4), graph_stages=1)),
        (RESNET, {**RESNET, 'out_indices': (1, 3)}, dict(mixer=dict(width=4))),
        (timm_features(), timm_features(), dict(mixer=dict(width=4))),
        (CONVNEXT, CONVNEXT, dict(mixer=dict(width=4), graph_stages=3)),
        (MOBILENET, MOBILENET, dict(adapter=dict(rank=4))),
    ],
    ids=['Swin', 'Swin, fewer stages', 'MiT', 'ResNet', 'ViT', 'ConvNeXt', 'of no known family'],
)
def test_every_family_shares(backbone, other, options):
    one, two = pair(backbone, other, **options)
    with torch.no_grad():
        expected = [wrapper(images()) for wrapper in (one, two)]
        shared = SharedPass('cpu')
        shared.join('one', one)
        shared.join('two', two)
        with shared.one_image():
            found = [wrapper(images()) for wrapper in (two, one)][::-1]
    for maps, own in zip(found, expected):
        assert_close([*maps], [*own], rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs CUDA')
@pytest.mark.parametrize('dtype', [None, 'bfloat16'])
def test_a_gpu_holds_one_base(dtype):
    """As on the CPU, from where each wrapper comes."""
    backbone = swin(embed_dims=96, num_heads=(3, 6, 12, 24))
    one, two = (stir(e3va(backbone, frozen_dtype=dtype), scale).eval() for scale in (0.05, 0.1))
    shared = SharedPass('cuda')
    shared.join('one', one)
    held = torch.cuda.memory_allocated()
    shared.join('two', two)
    assert torch.cuda.memory_allocated() - held < 0.2 * held
    assert all(value.is_cuda for value in two.state_dict(keep_vars=True).values() if value.is_floating_point())
    batch = images().cuda()
    with torch.no_grad():
        expected = [wrapper(batch) for wrapper in (one, two)]
        with shared.one_image():
            found = [wrapper(batch) for wrapper in (one, two)]
    for maps, own in zip(found, expected):
        assert_close([*maps], [*own], rtol=1e-2 if dtype else 1e-4, atol=1e-2 if dtype else 1e-4)


def test_one_product_reduces_a_tap_for_all(monkeypatch):
    one, two = pair(swin(), adapter=dict(rank=4))
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, 'mm', lambda *args, **options: products.append(args[1].shape[1]) or mm(*args, **options))
    with torch.no_grad():
        one.hear_together([one, two], images())
    assert products == [16 + 8] * 16  # two a block


def test_training_by_one_pass_has_the_gradients_of_each_alone():
    wrappers = pair(swin(), swin('mmdet', out_indices=(1, 2, 3)), mixer=dict(width=4), graph_stages=1)
    shared = SharedPass('cpu')
    for name, wrapper in zip('ab', wrappers):
        shared.join(name, wrapper.train())
    gradients = []
    for together in (False, True):
        with shared.one_image() if together else contextlib.nullcontext():
            sum(output.square().mean() for wrapper in wrappers for output in wrapper(images())).backward()
        named = [(name, value) for wrapper in wrappers for name, value in wrapper.named_parameters()]
        gradients.append([value.grad for _, value in named if value.requires_grad])
        assert all(value.grad is None for _, value in named if not value.requires_grad)
        for wrapper in wrappers:
            wrapper.zero_grad()
    assert len(gradients[0]) > 50 and all(gradient is not None for gradient in gradients[0])
    assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
