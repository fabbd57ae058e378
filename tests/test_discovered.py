"""ResNets, and backbones of no known family: every one that the toolboxes register, and somebody's own."""

from functools import partial

import mmdet.models  # noqa: F401  (registers backbones)
import mmseg.models  # noqa: F401  (registers backbones)
import pytest
import torch
from conftest import e3va, images, stir
from mmengine.registry import MODELS, init_default_scope
from torch import nn
from torch.testing import assert_close

from e3va_mm.families.discovered import DiscoveredFamily
from e3va_mm.families.resnet import ResNetFamily

_RES = dict(base_channels=8, zero_init_residual=False)
_VIT = dict(embed_dims=16, num_heads=2, num_layers=4, out_indices=(0, 1, 3))
_TWINS = dict(
    embed_dims=[8, 16, 24, 32], num_heads=[1, 2, 3, 4], mlp_ratios=[2] * 4, depths=[2] * 4, sr_ratios=[8, 4, 2, 1]
)
_STDC = dict(
    type='STDCNet', stdc_type='STDCNet1', in_channels=3, channels=(8, 16, 256, 512, 1024), bottleneck_type='cat',
    num_convs=4, norm_cfg=dict(type='BN'), act_cfg=dict(type='ReLU'), with_final_conv=True,
)  # fmt: skip
_INNER = dict(type='mmseg.ResNet', depth=18, base_channels=8, in_channels=3, out_indices=(0, 1, 2, 3))


def _hrnet_stage(block, *channels):
    counts = dict(num_modules=1, num_branches=len(channels), num_blocks=(2,) * len(channels))
    return dict(block=block, num_channels=channels, **counts)


RESNETS = {
    'mmdet.ResNet': dict(depth=18, **_RES),
    'mmdet.ResNeXt': dict(depth=50, groups=2, base_width=4, out_indices=(3,)),
    'mmdet.ResNeSt': dict(depth=50, base_channels=8),
    'mmdet.Res2Net': dict(depth=50, scales=4, base_width=4),
    'mmdet.RegNet': dict(arch='regnetx_400mf', out_indices=(0, 1)),
    'mmdet.DetectoRS_ResNet': dict(depth=50, conv_cfg=dict(type='ConvAWS'), output_img=True, base_channels=8),
    'mmdet.ResNetV1d': dict(depth=50, base_channels=8),
    'mmseg.ResNetV1c': dict(depth=50, strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), base_channels=8),
}
OTHERS = {
    'mmdet.HRNet': dict(
        extra=dict(
            stage1=_hrnet_stage('BOTTLENECK', 8),
            stage2=_hrnet_stage('BASIC', 8, 16),
            stage3=_hrnet_stage('BASIC', 8, 16, 24),
            stage4=_hrnet_stage('BASIC', 8, 16, 24, 32),
        )
    ),
    'mmdet.MobileNetV2': dict(widen_factor=0.25),
    'mmseg.MobileNetV2': dict(widen_factor=0.25, out_indices=(1, 2, 4, 6)),
    'mmseg.MobileNetV3': dict(arch='small', out_indices=(0, 1, 12)),
    'mmdet.EfficientNet': dict(arch='b0', out_indices=(3, 4, 5)),
    'mmdet.Darknet': dict(out_indices=(1, 2)),
    'mmdet.CSPDarknet': dict(deepen_factor=0.33, widen_factor=0.125),
    'mmdet.CSPNeXt': dict(deepen_factor=0.33, widen_factor=0.125),
    'mmdet.PyramidVisionTransformer': dict(embed_dims=8, num_layers=[2] * 4),
    'mmdet.PyramidVisionTransformerV2': dict(embed_dims=8, num_layers=[2] * 4),
    'mmseg.PCPVT': dict(_TWINS, norm_after_stage=False),
    'mmseg.SVT': dict(_TWINS, windiow_sizes=[7] * 4, norm_after_stage=True),
    'mmseg.VisionTransformer': dict(_VIT, img_size=(64, 96), final_norm=True),
    'mmseg.BEiT': dict(_VIT, img_size=(64, 96)),
    'mmseg.MAE': dict(_VIT, img_size=(64, 96)),
    'mmseg.MSCAN': dict(embed_dims=[8, 16, 24, 32], depths=[2] * 4),
    'mmseg.UNet': dict(base_channels=4),
    'mmseg.STDCContextPathNet': dict(
        backbone_cfg=_STDC,
        last_in_channels=(1024, 512),
        out_channels=16,
        ffm_cfg=dict(in_channels=16 + 256, out_channels=16, scale_factor=4),
    ),
    'mmseg.ICNet': dict(
        backbone_cfg=dict(_INNER, type='mmseg.ResNetV1c', contract_dilation=True),
        in_channels=3,
        layer_channels=(16, 64),
        light_branch_middle_channels=8,
        psp_out_channels=16,
        out_channels=(8, 16, 16),
    ),
    'mmseg.BiSeNetV1': dict(
        backbone_cfg=_INNER,
        context_channels=(16, 32, 64),
        spatial_channels=(8, 8, 8, 16),
        out_channels=16,
    ),
    'mmseg.BiSeNetV2': dict(
        detail_channels=(8, 8, 16), semantic_channels=(4, 8, 16, 16), bga_channels=16, out_indices=(0, 1, 2, 3, 4)
    ),
    'mmseg.FastSCNN': {},
    'mmseg.ERFNet': {},
    'mmseg.CGNet': dict(num_channels=(8, 16, 32)),
    'mmseg.DDRNet': dict(channels=8, ppm_channels=16),
    'mmseg.PIDNet': dict(channels=8, ppm_channels=12),
    'mmdet.SSDVGG': dict(depth=11, out_indices=(3, 4), out_feature_indices=(14, 24)),
    'mmdet.HourglassNet': dict(
        downsample_times=2, num_stacks=2, stage_channels=[8, 8, 12], stage_blocks=[2, 2, 2], feat_channel=8
    ),
    'mmseg.TIMMBackbone': dict(model_name='resnet18', features_only=True, pretrained=False),
}
# These take no images of odd sizes.
EVEN = {'BEiT', 'MAE', 'UNet', 'HourglassNet', 'HRNet', 'CSPDarknet', 'DDRNet', 'PIDNet', 'STDCContextPathNet'}


def as_list(maps):
    return [maps] if isinstance(maps, torch.Tensor) else list(maps)


@pytest.mark.parametrize('name', [*RESNETS, *OTHERS])
def test_a_registered_backbone(name):
    init_default_scope(name.partition('.')[0])
    model = e3va(dict(type=name, **{**RESNETS, **OTHERS}[name]))
    assert isinstance(model.family, ResNetFamily if name in RESNETS else DiscoveredFamily)
    assert all(stage.blocks for stage in model.family.stages), 'every map has taps'
    batch = images((64, 96) if name.partition('.')[2] in EVEN else (57, 83))
    for mode in (False, True):
        model.train(mode)
        with torch.no_grad():
            model.backbone.training = mode  # some return more maps then
            expected = model.backbone(batch)
            model.backbone.training = False
        for _ in range(2):  # the first pass, which is checked, and another
            outputs = model(batch)
            assert isinstance(outputs, torch.Tensor) == isinstance(expected, torch.Tensor)
            assert_close(as_list(outputs), as_list(expected), rtol=1e-4, atol=1e-5)
    stir(model).train()
    pairs = [pair for pair in zip(as_list(model(batch)), as_list(expected)) if pair[0] is not batch]
    assert all((output - own).abs().max() > 0 for output, own in pairs)
    sum(output.square().mean() for output, _ in pairs).backward()
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad == key.startswith('highway.'), key
        assert (parameter.grad is not None) == parameter.requires_grad, key


def test_a_resnet_says_its_branches():
    stages = e3va(dict(type='mmdet.ResNet', **RESNETS['mmdet.ResNet'])).family.stages
    assert [stage.embed_dims for stage in stages] == [8, 16, 32, 64]
    assert [block.taps for block in stages[1].blocks] == [('layer2.0.bn2',), ('layer2.1.bn2',)]
    model = e3va(dict(type='mmdet.ResNet', depth=50, base_channels=8))
    assert [block.taps for block in model.family.stages[1].blocks][:2] == [('layer2.0.conv3',), ('layer2.1.conv3',)]
    assert model.highway[1].down_in.shape[1] == 16 and model.highway[1].up_out.shape[2] == 64


def test_a_resnet_ends_behind_its_last_output():
    model, calls = e3va(dict(type='mmdet.ResNet', **RESNETS['mmdet.ResNet'], out_indices=(1,))), []
    model(images())
    model.backbone.layer3.register_forward_hook(lambda *_: calls.append(3))
    assert [tuple(each.shape[:2]) for each in model(images())] == [(2, 16)]
    assert not calls


def test_what_detectors_add_to_a_resnet_need_not_be_in_its_weights(tmp_path):
    plain = MODELS.build(dict(type='mmdet.ResNet', depth=50, base_channels=8))
    path = tmp_path / 'resnet.pth'
    torch.save(plain.state_dict(), path)
    plugin = dict(cfg=dict(type='ContextBlock', ratio=0.25), position='after_conv3')
    config = dict(
        type='mmdet.ResNet',
        depth=50,
        base_channels=8,
        dcn=dict(type='DCNv2', deform_groups=1, fallback_on_stride=False),
        stage_with_dcn=(False, True, True, True),
        plugins=[plugin],
        init_cfg=dict(type='Pretrained', checkpoint=str(path)),
    )
    model = e3va(config)
    loaded = model.backbone.state_dict()
    for name, value in plain.state_dict().items():
        assert_close(loaded[name], value)
    assert not loaded['layer2.0.conv2.conv_offset.weight'].any()


def test_a_checkpoint_leaves_a_base_alone_that_recomputes_what_it_misses():
    # DetectoRS' convolutions take their gamma and beta from their weights, unless they are given.
    model = e3va(dict(type='mmdet.ResNet', depth=50, base_channels=8, conv_cfg=dict(type='ConvAWS')))
    before = {name: value.clone() for name, value in model.backbone.state_dict().items()}
    assert any(name.endswith('weight_gamma') for name in before)
    stir(model)
    model.load_state_dict(model.state_dict())
    for name, value in model.backbone.state_dict().items():
        assert_close(value, before[name], rtol=0, atol=0)


class Own(nn.Module):
    """Somebody's: tokens with two ahead of the patches, then a map; blocks return a tuple."""

    class Block(nn.Module):
        def __init__(self, dims):
            super().__init__()
            self.linear = nn.Linear(dims, dims)

        def forward(self, tokens, scale=1.0):
            return tokens + scale * self.linear(tokens).tanh(), scale

    def __init__(self, returned=tuple):
        super().__init__()
        self.stem, self.returned, self.init_cfg = nn.Conv2d(4, 6, 8, 8), returned, None
        self.blocks = nn.ModuleList(self.Block(6) for _ in range(2))
        self.last = nn.Sequential(nn.Conv2d(6, 9, 3, 2, 1), nn.BatchNorm2d(9), nn.ReLU(inplace=True))

    def init_weights(self):
        pass

    def forward(self, images):
        grid = self.stem(images)
        tokens = torch.cat([images.new_ones(len(images), 2, 6), grid.flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            tokens, _ = block(tokens)
        grid = tokens[:, 2:].transpose(1, 2).view_as(grid)
        return self.returned([grid, self.last(grid)])


def test_somebodys_own_backbone():
    model = stir(e3va(Own()))
    assert [[block.name for block in stage.blocks] for stage in model.family.stages] == [
        ['blocks.0', 'blocks.1'],
        ['last.0', 'last.1'],
    ]
    assert model.family.prefixes == [2, 0]
    batch = torch.randn(2, 4, 40, 64)
    outputs = model(batch)
    # The same by its definition: a level and the deltas of its taps; the state before is pooled.
    heard = []
    with torch.no_grad():
        for path in ('blocks.0', 'blocks.1', 'last.0', 'last.1'):
            model.backbone.get_submodule(path).register_forward_hook(partial(_note, heard))
        first, second = model.backbone(batch)
    deltas = []
    for adapters, taps in zip(model.highway, ([tap[:, 2:] for tap in heard[:2]], [_tokens(tap) for tap in heard[2:]])):
        record = adapters.record()
        for tap in taps:
            record.add(tap)
        deltas.append(adapters(record))
    offset = deltas[0].transpose(1, 2).view_as(first)
    assert_close(outputs[0], first + offset)
    carried = nn.functional.adaptive_avg_pool2d(offset, second.shape[2:])
    carried = nn.functional.pad(carried, (0, 0, 0, 0, 0, 3))
    assert_close(outputs[1], second + carried + deltas[1].transpose(1, 2).view_as(second))


def _note(heard, module, args, output):
    heard.append((output[0] if isinstance(output, tuple) else output).clone())


def _tokens(image):
    return image.flatten(2).transpose(1, 2)


@pytest.mark.parametrize(
    ('returned', 'message'),
    [
        (lambda maps: dict(enumerate(maps)), 'no maps'),
        (lambda maps: [each.mean((2, 3)) for each in maps], 'no maps'),
        (lambda maps: maps[5], 'could not be tried out .* IndexError'),
    ],
    ids=['a dict', 'vectors', 'a failure'],
)
def test_what_returns_no_maps_is_refused(returned, message):
    with pytest.raises(TypeError, match=f'(?s)Own.*{message}'):
        e3va(Own(returned))


def test_a_backbone_that_takes_one_size_of_image_is_tried_out_with_it():
    init_default_scope('mmseg')
    model = e3va(dict(type='mmseg.BEiT', **_VIT, img_size=(48, 80)))
    assert all(stage.blocks for stage in model.family.stages)
    with pytest.raises(TypeError, match='BEiT could not be tried out'):
        model.backbone.img_size = (48, 96)
        e3va(model.backbone)


def test_a_trident_is_refused():
    with pytest.raises(TypeError, match='TridentResNet .* other maps in training'):
        e3va(dict(type='mmdet.TridentResNet', depth=50, num_branch=3, test_branch_idx=1, trident_dilations=(1, 2, 3),
                  strides=(1, 2, 2), dilations=(1, 1, 1), num_stages=3, out_indices=(2,)))  # fmt: skip


def test_tokens_as_taps_in_the_config():
    taps = [
        dict(taps=['layers.0.ffn.layers'], dims=16, prefix=1),
        dict(taps=['layers.3.attn.dropout_layer'], dims=16, prefix=1),
    ]
    backbone = dict(type='mmseg.VisionTransformer', **{**_VIT, 'out_indices': (0, 3)}, img_size=(64, 96))
    model = e3va(backbone, taps=taps)
    expected = model.backbone(images())
    assert_close(list(model(images())), list(expected))
    stir(model)
    assert all((each - own).abs().max() > 1e-4 for each, own in zip(model(images()), expected))
    model.backbone.layers[0].ffn.layers = nn.Sequential(nn.Linear(16, 16))  # replaced: found anew
    changed = model(images())
    assert (changed[0] - model.backbone(images())[0]).abs().max() > 1e-4


def test_the_log_says_what_is_heard(monkeypatch):
    said = []
    monkeypatch.setattr('e3va_mm.families.discovered.print_log', lambda text, **options: said.append(text))
    e3va(Own())
    assert "taps=[{'taps': ['blocks.0', 'blocks.1'], 'dims': 6, 'prefix': 2}" in said[0]
