"""Comparison methods on every family of backbones: transformers, ResNets, and what is found by being run."""

import mmdet.models  # noqa: F401  (registers backbones)
import mmseg.models  # noqa: F401  (registers backbones)
import pytest
import torch
from conftest import FAMILIES, every_family, images, stir, timm_features
from mmengine.registry import MODELS
from torch.testing import assert_close

ANYWHERE = [dict(type=name) for name in ('Full', 'Frozen', 'BitFit', 'NormTuning', 'Partial', 'Adapter', 'LoRand')]
RESNETS = {
    'basic blocks': dict(type='mmdet.ResNet', depth=18, base_channels=8, zero_init_residual=False),
    'dilations': dict(type='mmseg.ResNetV1c', depth=50, base_channels=4, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4)),
    'groups': dict(type='mmdet.ResNeXt', depth=50, groups=2, base_width=4, norm_eval=False),
}
# Found by being run; a convolution's weights, and those of an attention, are used without calling it.
DISCOVERED = {
    'maps': dict(type='mmdet.CSPNeXt', deepen_factor=0.33, widen_factor=0.125),
    'tokens': dict(type='mmdet.PyramidVisionTransformerV2', embed_dims=8, num_layers=[1] * 4),
}
ALL = {**FAMILIES, **RESNETS, **DISCOVERED}


def tuned(backbone, method):
    torch.manual_seed(0)
    return MODELS.build(dict(type='TunedBackbone', backbone=backbone, method=method))


@pytest.mark.parametrize('backbone', ALL.values(), ids=ALL)
def test_comparison_methods(backbone):
    methods, name = list(ANYWHERE), str(backbone)
    if 'hiera' in name or 'patch' in name or 'pvt_v2_b0' in name:
        methods.append(dict(type='AdaptFormer', attention='hiera' not in name))
    if 'swinv2' not in name:
        methods.append(dict(type='LoRA', r=2))
    torch.manual_seed(0)
    stock = MODELS.build(backbone)
    stock.train(False)
    expected = stock(images())
    for method in methods:
        model = tuned(backbone, method).train()
        outputs = model(images())
        if method['type'] != 'Full':  # its batch norms and dropout are those of training
            assert_close(list(outputs), list(expected))
        if method['type'] != 'Frozen':
            sum(output.square().mean() for output in stir(model)(images())).backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == parameter.requires_grad, (method, name)
        assert any(parameter.requires_grad for parameter in model.parameters()) == (method['type'] != 'Frozen')


@every_family
def test_no_norm_of_bitfit_has_its_stock_backward(backbone):
    """CUDA's fails where the bias is trained and the weight is not."""
    for name, module in tuned(backbone, dict(type='BitFit')).backbone.named_modules():
        if isinstance(module, torch.nn.LayerNorm) and module.bias is not None:
            assert type(module).__name__.endswith('WithFreeBias') and not module.weight.requires_grad, name


def test_lora_where_it_would_do_nothing():
    with pytest.raises(ValueError, match=r"target_modules has \['qkv'\], but this backbone uses"):
        tuned(timm_features('swinv2_base_window12_192'), dict(type='LoRA'))
    with pytest.raises(ValueError, match=r"target_modules has \['qkv'\]"):
        tuned(timm_features('swinv2_base_window12_192'), dict(type='LoRA', target_modules=r'.*\.qkv'))
    tuned(timm_features('swinv2_base_window12_192'), dict(type='LoRA', target_modules=['proj']))


@pytest.mark.parametrize('method', ['Mona', 'LST', 'DTL'])
def test_methods_that_need_a_swin(method):
    with pytest.raises(ValueError, match=f'{method} is defined for SwinTransformer only, not for TIMMFeatures'):
        tuned(timm_features(), dict(type=method))


def test_adapters_are_where_the_taps_are():
    """Behind what the highway hears, in its width; of a bottleneck, ahead of the convolution that ends its branch."""
    model = stir(tuned(RESNETS['dilations'], dict(type='Adapter', width=4))).eval()
    with torch.no_grad():
        reference, inserted, stock = model(images()), iter(model.method.inserted), MODELS.build(RESNETS['dilations'])
        stock.load_state_dict(model.backbone.state_dict(), strict=False)
        stock.train(False)
        for layer in ('layer1', 'layer2', 'layer3', 'layer4'):
            for block in getattr(stock, layer):
                block.conv3 = torch.nn.Sequential(_Adapted(next(inserted)), block.conv3)
        assert_close(list(stock(images())), list(reference))
    assert not list(inserted)
    assert [each.up.out_features for each in model.method.inserted][::6] == [4, 8, 16]


class _Adapted(torch.nn.Module):
    def __init__(self, adapter):
        super().__init__()
        self.adapter = adapter

    def forward(self, image):
        tokens = image.flatten(2).transpose(1, 2)
        return image + self.adapter(tokens).transpose(1, 2).view_as(image)


@pytest.mark.parametrize('name', [*RESNETS, *DISCOVERED])
@pytest.mark.parametrize('options', [{}, dict(use_dora=True)], ids=['LoRA', 'DoRA'])
def test_lora_in_convolutions_can_be_merged(name, options):
    model = stir(tuned(ALL[name], dict(type='LoRA', r=2, **options))).eval()
    expected = model(images())
    merged = model.merge()
    stock = MODELS.build(ALL[name])
    stock.train(False)
    stock.load_state_dict(merged.state_dict())
    assert any(
        (each - own).abs().max() > 1e-3 for each, own in zip(expected, tuned(ALL[name], dict(type='Frozen'))(images()))
    )
    for output, reference in zip(stock(images()), expected):
        assert_close(output, reference, rtol=1e-5, atol=1e-5 * reference.abs().max().item())


def test_lora_in_grouped_convolutions():
    targets = dict(type='LoRA', r=2, target_modules=['conv2'])
    with pytest.raises(ValueError, match=r"does not merge into grouped convolutions.*'layer1.0.conv2'"):
        tuned(RESNETS['groups'], targets).merge()
    with pytest.raises(ValueError, match='peft does not take method=.*groups=2 and rank 3'):
        tuned(RESNETS['groups'], dict(targets, r=3))


def test_lora_without_a_layer_to_be_in():
    backbone = dict(type='mmdet.ResNet', depth=50, base_channels=8, conv_cfg=dict(type='ConvAWS'))
    with pytest.raises(ValueError, match='no ungrouped convolution of torch.* of ResNet: name layers by method.target'):
        tuned(backbone, dict(type='LoRA'))


def test_methods_that_need_attention():
    with pytest.raises(ValueError, match='needs blocks with attn and mlp, and InvertedResidual has not both'):
        tuned(timm_features('mobilenetv2_050'), dict(type='AdaptFormer'))
    with pytest.raises(ValueError, match='attention=True does not fit HieraBlock, whose attention pools'):
        tuned(timm_features('hiera_tiny_224'), dict(type='AdaptFormer'))
