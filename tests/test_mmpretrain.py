"""Backbones of mmpretrain, as configs of the two toolboxes take them, where it is installed."""

import pytest
import torch
from conftest import images, stir
from mmengine.registry import MODELS, init_default_scope
from torch.testing import assert_close

import e3va_mm
from e3va_mm.tune import find_config

pytest.importorskip('mmpretrain', reason='needs mmpretrain: the extra pretrain')


@pytest.mark.parametrize(
    'name',
    [
        'mmdet::convnext/mask-rcnn_convnext-t-p4-w7_fpn_amp-ms-crop-3x_coco',
        'mmseg::convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512',
    ],
)
@pytest.mark.parametrize('method', ['e3va', 'adapter', 'lora', 'bitfit'])
def test_convnext_in_a_stock_config(name, method):
    config = e3va_mm.tune(find_config(name), method, frozen_dtype=None).model.backbone
    config.backbone.update(arch=dict(depths=[1, 2, 1, 1], channels=[8, 12, 16, 24]), init_cfg=None)
    init_default_scope(name.partition('::')[0])
    model = MODELS.build(config).train()
    stock = MODELS.build(config.backbone)
    names = (key.replace('.base_layer.', '.') for key in model.backbone.state_dict() if '.lora_' not in key)
    values = (value for key, value in model.backbone.state_dict().items() if '.lora_' not in key)
    stock.load_state_dict(dict(zip(names, values)))
    stock.eval()
    with torch.no_grad():
        assert_close(list(model(images())), list(stock(images())))
    sum(output.square().mean() for output in stir(model)(images())).backward()
    for key, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, key


@pytest.mark.parametrize(
    'backbone',
    [
        dict(type='mmpretrain.TIMMBackbone', model_name='resnet18', features_only=True, pretrained=False),
        dict(type='mmpretrain.ResNet', depth=18, base_channels=8, out_indices=(1, 3)),
        dict(
            type='mmpretrain.VisionTransformer', arch='deit-tiny', img_size=64, out_type='featmap', out_indices=(5, 11)
        ),
    ],
    ids=lambda backbone: backbone['type'],
)
def test_other_backbones(backbone):
    model = MODELS.build(dict(type='E3VABackbone', backbone=backbone, frozen_dtype=None)).train()
    batch = images((64, 64))
    assert_close(list(model(batch)), list(model.backbone(batch)))
    sum(output.square().mean() for output in stir(model)(batch)).backward()
    assert all((each.grad is not None) == each.requires_grad for each in model.parameters())
