"""At which rates a tuned config learns."""

from types import SimpleNamespace

import pytest
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from test_tune import OPTIMIZER, SWIN, config
from torch import nn

import e3va_mm
from e3va_mm.checkpoints.base_weights import names_weights
from e3va_mm.optim import ADAMW_SHARE, parameters_by_origin


def rates_of(tuned: Config):
    """The rates of adapters and mixers, of output norms, and the weight decays of one-dimensional parameters."""
    model = nn.Module()
    model.backbone, model.decode_head = MODELS.build(tuned.model.backbone), nn.Linear(2, 2)
    groups = build_optim_wrapper(model, tuned.optim_wrapper).optimizer.param_groups
    of = {id(each): group for group in groups for each in group['params']}
    added, stock = parameters_by_origin(model)
    parts = [[each for name, each in added.items() if (name in stock) == is_norm] for is_norm in (False, True)]
    flat = [each for each in [*added.values(), *model.decode_head.parameters()] if each.ndim == 1]
    decays = {of[id(each)]['weight_decay'] for each in flat}
    return *({of[id(each)]['lr'] for each in part} for part in parts), decays


LAYER_DECAY = {
    'LearningRateDecayOptimizerConstructor': dict(num_layers=6, decay_rate=0.9, decay_type='stage_wise'),
    'LayerDecayOptimizerConstructor': dict(num_layers=12, layer_decay_rate=0.9),
    'mmpretrain.LearningRateDecayOptimWrapperConstructor': dict(
        layer_decay_rate=0.75, custom_keys=dict(nothing=dict())
    ),
}


@pytest.mark.parametrize(('constructor', 'paramwise_cfg'), LAYER_DECAY.items())
def test_layer_decay_ends_and_leaves_its_weight_decay(constructor, paramwise_cfg):
    given = dict(OPTIMIZER, constructor=constructor, paramwise_cfg=paramwise_cfg)
    tuned = e3va_mm.tune(config(optim_wrapper=given), 'e3va-paper', mixer=None)
    rates, norms, decays = rates_of(tuned)
    assert rates == norms == {1e-3} and decays == {0.0}
    assert tuned.optim_wrapper.paramwise_cfg.get('custom_keys', {}) == paramwise_cfg.get('custom_keys', {})


def test_constructors_of_others_stay():
    given = dict(OPTIMIZER, constructor='MyConstructor')
    assert e3va_mm.tune(config(optim_wrapper=given)).optim_wrapper == given
    assert e3va_mm.tune(config()).optim_wrapper is None


STOCK = [
    SWIN,
    'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb2-300k_mapillay_v1_65-1280x1280',
    'mmseg::knet/knet-s3_swin-t_upernet_8xb2-adamw-80k_ade20k-512x512',
    'mmseg::mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512',
    'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512',
    'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco',
    'mmdet::dino/dino-4scale_r50_8xb2-12e_coco',
    'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco',
    'mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco',
    'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco',
    'mmdet::mm_grounding_dino/grounding_dino_swin-t_finetune_8xb4_20e_cat',
    'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco',
    'mmdet::yolof/yolof_r50-c5_8xb8-1x_coco',
]


def base_rate(tuned: Config) -> float:
    optimizer = tuned.optim_wrapper.optimizer
    return optimizer.lr * (ADAMW_SHARE if optimizer.type == 'SGD' else 1)


@pytest.mark.parametrize('name', STOCK, ids=[name.rpartition('/')[2] for name in STOCK])
def test_what_stock_configs_add_learns_at_their_own_rate(name):
    tuned = e3va_mm.tune(name, 'e3va-paper')
    backbone = tuned.model.backbone.backbone
    assert names_weights(SimpleNamespace(init_cfg=backbone.get('init_cfg')))
    init_default_scope(tuned.default_scope)
    rates, norms, _ = rates_of(tuned)
    assert rates == {base_rate(tuned)} and norms <= rates


@pytest.mark.parametrize('name', STOCK, ids=[name.rpartition('/')[2] for name in STOCK])
def test_a_highway_with_mixers_learns_ten_times_as_fast(name):
    tuned = e3va_mm.tune(name)
    init_default_scope(tuned.default_scope)
    rates, norms, _ = rates_of(tuned)
    base = base_rate(tuned)
    highest = max(rates - {base})
    assert highest == pytest.approx(min(10 * base, 0.005)) and norms <= {base}
    # A mixer's norm has no fan-in; the widest stages, of ResNets, have 2048 channels.
    assert base in rates and min(rates) >= min(base, highest / 8)


def test_without_mixers_the_highway_keeps_the_configs_rate():
    for tuned in (
        e3va_mm.tune(config(optim_wrapper=OPTIMIZER), mixer=None),
        e3va_mm.tune(config(optim_wrapper=OPTIMIZER)),
    ):
        tuned.model.backbone.mixer = None  # as --cfg-options do
        assert rates_of(tuned)[0] == {1e-3}
