"""Comparison methods: counts and names, equality with the frozen backbone at the start, gradients, checkpoints."""

import copy
import itertools
import re

import pytest
import torch
from conftest import graph_nodes, images, stir, swin, timm_features, tool
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from e3va_mm.methods import METHODS
from e3va_mm.methods.peft_methods import LoRA

BLOCKS = [f'stages.{stage}.blocks.{block}' for stage in range(4) for block in range(2)]
# Every method, with options that suit the tiny backbone.
SMALL = {
    'Full': {},
    'Frozen': {},
    'BitFit': {},
    'NormTuning': {},
    'Partial': {},
    'Adapter': dict(width=4),
    'AdaptFormer': dict(width=4),
    'LoRand': dict(rank=2),
    'Mona': dict(width=4),
    'LoRA': dict(r=2),
    'PEFT': dict(peft_type='LOHA', r=2, alpha=2, target_modules=['qkv']),
    'LST': dict(reduction=4),
    'DTL': {},
}
SMALL_CASES = [dict(type=name, **options) for name, options in SMALL.items()] + [
    dict(type='Partial', num_blocks=3),
    dict(type='AdaptFormer', width=4, attention=False),
    dict(type='LoRand', rank=2, shared_core=False),
    dict(type='DTL', kernel_size=5, first_stage=1, num_fed_blocks=5),
    dict(type='LoRA', r=2, target_modules=['layers.0.0', 'layers.1'], use_dora=True),
]
IDS = [' '.join(map(str, case.values())) for case in SMALL_CASES]


def tuned(method, backbone=None, **options):
    if method['type'] in ('LoRA', 'PEFT'):
        pytest.importorskip('peft', reason='needs the peft library')
    torch.manual_seed(0)
    model = MODELS.build(dict(type='TunedBackbone', backbone=backbone or swin(), method=method, **options))
    model.init_weights()
    return model


def trained_names(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_every_method_is_tested():
    assert set(SMALL) == set(METHODS)


@pytest.mark.parametrize(
    ('method', 'count'),
    [
        (dict(type='BitFit'), 201_656),
        (dict(type='NormTuning'), 59_392),
        (dict(type='Partial'), 12_601_632),
        (dict(type='Adapter'), 3_107_328),
        (dict(type='AdaptFormer'), 3_107_328),
        (dict(type='LoRand'), 1_197_312),
        (dict(type='LoRA'), 3_032_064),
        (dict(type='Mona'), 3_667_456),
        # 18 maps of 2 * 4 * 512 and 2 of 2 * 4 * 1024.
        (dict(type='DTL'), 90_112),
        (dict(type='LST'), 2_485_648),
    ],
    ids=lambda value: value['type'] if isinstance(value, dict) else str(value),
)
def test_trained_parameters_of_swin_b(method, count):
    if method['type'] == 'LoRA':
        pytest.importorskip('peft')
    backbone = swin(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    model = MODELS.build(dict(type='TunedBackbone', backbone=backbone, method=method))
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == count


@pytest.mark.parametrize('method', SMALL_CASES, ids=IDS)
@pytest.mark.parametrize('size', [(64, 64), (37, 91)])
def test_starts_as_the_frozen_backbone(method, size):
    model, images = tuned(method), torch.randn(2, 3, *size)
    stock = MODELS.build(swin())
    stock.load_state_dict(stock_weights(model))
    stock.eval()
    for output, expected in zip(model.eval()(images), stock(images)):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def stock_weights(model):
    """The base weights by their stock names."""
    return {
        name.replace('.base_layer.', '.'): value
        for name, value in model.backbone.state_dict().items()
        if 'lora_' not in name and 'hada_' not in name
    }


def test_exact_names():
    def names(method):
        return {name.removeprefix('backbone.') for name in trained_names(tuned(dict(type=method, **SMALL[method])))}

    every = {name for name, _ in MODELS.build(swin()).named_parameters()}
    assert names('Full') == every
    assert names('Frozen') == set()
    assert names('BitFit') == {name for name in every if name.endswith(('.bias', '.relative_position_bias_table'))}
    assert names('NormTuning') == {name for name in every if 'norm' in name}
    assert names('Partial') == {name for name in every if name.startswith('stages.3.blocks.1.')}
    parts = ('down.weight', 'down.bias', 'up.weight', 'up.bias')
    assert names('Adapter') == {f'method.inserted.{index}.{part}' for index in range(16) for part in parts}
    assert names('AdaptFormer') == names('Adapter')
    factors = ('down_in', 'core', 'down_out', 'down_bias', 'up_in', 'up_out', 'up_bias')
    assert names('LoRand') == {f'method.inserted.{index}.{factor}' for index in range(16) for factor in factors}
    layers = ('norm', 'bottleneck.down', 'bottleneck.up', 'pointwise', *(f'filter.convs.{index}' for index in range(3)))
    parts = ('norm_scale', 'skip_scale', *(f'{layer}.{kind}' for layer in layers for kind in ('weight', 'bias')))
    assert names('Mona') == {f'method.inserted.{index}.{part}' for index in range(16) for part in parts}
    maps = itertools.product((0, 1), (0, 1), (0, 1))  # of the last two stages' blocks, two factors each
    assert names('DTL') == {f'method.stages.{stage}.maps.{block}.{factor}.weight' for stage, block, factor in maps}
    side_network = tuned(dict(type='LST', reduction=4)).method
    assert names('LST') == {f'method.{name}' for name, _ in side_network.named_parameters()}
    loha = ('hada_w1_a', 'hada_w1_b', 'hada_w2_a', 'hada_w2_b')
    assert names('PEFT') == {f'{block}.attn.w_msa.qkv.{factor}.default' for block in BLOCKS for factor in loha}
    kinds = ('lora_A', 'lora_B')
    sites = ('qkv', 'proj')
    assert names('LoRA') == {
        f'{block}.attn.w_msa.{site}.{kind}.default.weight' for block in BLOCKS for site in sites for kind in kinds
    }


@pytest.mark.parametrize('method', SMALL_CASES, ids=IDS)
def test_gradients_reach_what_is_trained_and_nothing_else(method):
    model = stir(tuned(method)).train()
    outputs = model(torch.randn(2, 3, 50, 70))
    if method['type'] == 'Frozen':
        assert not any(output.requires_grad for output in outputs)
        return
    sum(output.square().sum() for output in outputs).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


@pytest.mark.parametrize('method', SMALL_CASES, ids=IDS)
def test_checkpoints_hold_what_is_trained(method, weights):
    backbone = swin(init_cfg=dict(type='Pretrained', checkpoint=weights))
    model = stir(tuned(method, backbone))
    state = model.state_dict()
    buffers = {name for name in state if 'relative_position_index' in name}
    assert set(state) - buffers - {'base_fingerprint'} == trained_names(model)
    torch.manual_seed(1)
    clone = MODELS.build(dict(type='TunedBackbone', backbone=backbone, method=method))
    clone.load_state_dict(state, strict=False)
    images = torch.randn(1, 3, 64, 64)
    for output, expected in zip(clone.eval()(images), model.eval()(images)):
        torch.testing.assert_close(output, expected)


def test_checkpoints_hold_the_statistics_that_training_changes():
    backbone = timm_features('tf_efficientnet_lite0')
    model = tuned(dict(type='Full'), backbone)
    model.train()(images())
    clone = tuned(dict(type='Full'), backbone)
    clone.load_state_dict(model.state_dict())
    assert all(map(torch.equal, clone.eval()(images()), model.eval()(images())))
    assert not [name for name in tuned(dict(type='NormTuning'), backbone).state_dict() if 'running' in name]


def test_a_deep_copy_calls_its_own_modules():
    images = torch.randn(1, 3, 64, 64)
    for name in ('Adapter', 'Mona', 'LoRand', 'DTL'):
        model = tuned(dict(type=name, **SMALL[name])).eval()
        clone = copy.deepcopy(model)
        stir(clone, 1.0)
        before = model(images)[-1]
        assert not torch.allclose(before, clone(images)[-1])
        assert torch.equal(before, model(images)[-1])


def test_the_side_network_keeps_the_backbone_out_of_the_graph():
    model = stir(tuned(dict(type='LST', reduction=4)))
    nodes = graph_nodes(model(torch.randn(1, 3, 64, 64)))
    variables = {id(node.variable) for node in nodes if hasattr(node, 'variable')}
    assert not variables & {id(parameter) for parameter in model.backbone.stages.parameters()}


def test_merged_lora_is_a_stock_backbone_with_the_same_outputs():
    model = stir(tuned(dict(type='LoRA', r=2))).eval()
    images = torch.randn(1, 3, 64, 64)
    expected = model(images)
    stock = MODELS.build(swin())
    stock.eval()
    stock_module = model.merge()
    stock.load_state_dict(stock_module.state_dict())
    for output, reference in zip(stock(images), expected):
        torch.testing.assert_close(output, reference, rtol=0, atol=1e-5)


def tuned_config(seg_config, path, method) -> Config:
    """The tiny segmentor under a comparison method, written to ``path``."""
    config = Config.fromfile(seg_config)
    stock = config.model.backbone.backbone
    config.merge_from_dict({'model.backbone': dict(_delete_=True, type='TunedBackbone', backbone=stock, method=method)})
    config.dump(path)
    return config


def test_training_and_testing_by_the_tools(seg_config, tmp_path):
    pytest.importorskip('peft')
    tuned_config(seg_config, tmp_path / 'tuned.py', dict(type='LoRA', r=2))
    work_dir = tmp_path / 'work'
    train = 'tools/train.py', tmp_path / 'tuned.py', '--work-dir', work_dir
    test = 'tools/test.py', tmp_path / 'tuned.py', work_dir / 'iter_4.pth', '--work-dir', tmp_path / 'test'
    logs = [tool(*command, with_peft=True) for command in (train, test)]
    trained, tested = (re.findall(r'mIoU: ([\d.]+)', log)[-1] for log in logs)
    assert trained == tested
    state = torch.load(work_dir / 'iter_4.pth', weights_only=False)['state_dict']
    assert not [key for key in state if key.endswith('qkv.base_layer.weight') or key.endswith('qkv.weight')]


def test_merging_by_the_tool(seg_config, tmp_path):
    pytest.importorskip('peft')
    config = tuned_config(seg_config, tmp_path / 'lora.py', dict(type='LoRA', r=2))
    init_default_scope('mmseg')
    torch.manual_seed(0)
    model = MODELS.build(config.model)
    model.init_weights()
    stir(model.backbone)
    torch.save({'state_dict': model.state_dict()}, tmp_path / 'lora.pth')
    paths = tmp_path / 'lora.py', tmp_path / 'lora.pth', tmp_path / 'merged.pth'
    tool('tools/merge.py', *paths, '--cfg-options', 'model.backbone.frozen_dtype=bfloat16', with_peft=True)
    config.model.backbone = config.model.backbone.backbone
    stock = MODELS.build(config.model)
    stock.load_state_dict(torch.load(tmp_path / 'merged.pth')['state_dict'])
    images = torch.randn(1, 3, 64, 64)
    pairs = zip(stock.eval().extract_feat(images), model.eval().extract_feat(images))
    assert all(torch.allclose(output, expected, atol=1e-5) for output, expected in pairs)


@pytest.mark.parametrize('targets', [r'stages\.\d\..*\.qkv', 'all-linear'])
def test_targets_as_peft_takes_them(targets):
    model = tuned(dict(type='LoRA', r=2, target_modules=targets))
    assert any('qkv.lora_A' in name for name in trained_names(model))
    assert any('layers.1.lora_A' in name for name in trained_names(model)) == (targets == 'all-linear')


def test_rounded_weights_are_not_merged():
    with pytest.raises(ValueError, match='frozen_dtype=torch.bfloat16 would round the updates away'):
        tuned(dict(type='LoRA', r=2), frozen_dtype='bfloat16').merge()


def test_only_peft_can_be_merged():
    with pytest.raises(ValueError, match='method Mona can not be merged'):
        tuned(dict(type='Mona', width=4)).merge()


@pytest.mark.parametrize(
    'method', [case for case in SMALL_CASES if case['type'] in ('Adapter', 'Mona', 'Partial', 'LST')]
)
def test_no_inserted_parameter_is_idle_under_fewer_outputs(method):
    model = stir(tuned(method, swin(out_indices=(1,))))
    sum(output.square().sum() for output in model(torch.randn(2, 3, 64, 64))).backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_bitfit_norms_compute_the_same():
    model = tuned(dict(type='BitFit'))
    stir(model)
    images = torch.randn(1, 3, 64, 64)
    stock = MODELS.build(swin())
    stock.eval()
    stock.load_state_dict(model.backbone.state_dict())
    for output, expected in zip(model(images), stock(images)):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_full_is_in_train_mode_and_the_others_are_not():
    backbone = swin(drop_path_rate=0.5)
    assert tuned(dict(type='Full'), backbone).train().backbone.training
    assert not tuned(dict(type='Adapter', width=4), backbone).train().backbone.training


UNDO = {
    'train of the stock module': lambda model: model.backbone.train(),
    'train': lambda model: model.train(),
    'requires_grad_': lambda model: model.requires_grad_(),
    'init_weights': lambda model: model.init_weights(),
}


@pytest.mark.parametrize('undo', UNDO.values(), ids=UNDO)
@pytest.mark.parametrize('method', [case for case in SMALL_CASES if case['type'] in ('Full', 'BitFit', 'Partial')])
def test_stock_code_does_not_change_what_is_frozen(method, undo):
    """Stages that a stock config freezes are trained where the method trains them, and no others ever."""
    model = MODELS.build(dict(type='TunedBackbone', backbone=swin('mmdet', frozen_stages=1), method=method))
    expected = trained_names(model)
    undo(model)
    sum(output.square().sum() for output in model(torch.randn(1, 3, 64, 64))).backward()
    assert trained_names(model) == expected
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == expected
    assert model.method.trains_backbone or not any(module.training for module in model.backbone.modules())


@pytest.mark.parametrize(
    ('method', 'message'),
    [
        (dict(type='Thawed'), 'method must be .* got .*Thawed'),
        (dict(type='Adapter', widht=4), r"unknown option \['widht'\].*known are \['width'\]"),
        (dict(type='Adapter', width=0), 'method.width must be an integer of at least 1, got 0'),
        (dict(type='Partial', num_blocks=9), 'num_blocks=9, but the backbone has 8 blocks'),
        *(
            (dict(type='Mona', kernel_sizes=sizes), 'method.kernel_sizes must be a list of odd integers, got')
            for sizes in ((2, 3), 3, (2.5,), (-3,), ())
        ),
        (dict(type='PEFT', r=2), r"method={'type': 'PEFT', 'r': 2} lacks \['peft_type'\]"),
        (dict(type='LoRA', rank=8), 'peft does not take method=.*rank'),
        (dict(type='PEFT', peft_type='LORE'), 'peft does not take method=.*LORE'),
        (dict(type='PEFT', peft_type='LOHA'), 'peft does not take method=.*LOHA.*target_modules'),
        (dict(type='LoRA', target_modules=['qvk']), 'peft does not take method=.*qvk'),
        (dict(type='DTL', kernel_size=4), r'method.kernel_size must be .* odd integers, got \[4\]'),
        (dict(type='DTL', first_stage=4), r'first_stage must be one of \[0, 1, 2, 3\], got 4'),
        (dict(type='DTL', num_fed_blocks=2), 'leaves stage 2 without a fed block'),
        (dict(type='LST', reduction=8), 'method.reduction=8 leaves stage 1'),
    ],
)
def test_bad_methods(method, message):
    with pytest.raises(ValueError, match=message):
        tuned(method)


def test_a_method_that_is_no_dict():
    with pytest.raises(ValueError, match="method must be dict\\(type=...\\) .* got 'Mona'"):
        MODELS.build(dict(type='TunedBackbone', backbone=swin(), method='Mona'))


def test_lora_without_peft(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'peft', None)
    with pytest.raises(ImportError, match=r"pip install 'e3va_mm\[peft\]'"):
        MODELS.build(dict(type='TunedBackbone', backbone=swin(), method=dict(type='LoRA')))
    assert issubclass(LoRA, torch.nn.Module)
