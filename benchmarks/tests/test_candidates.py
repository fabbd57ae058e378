"""What is tried for E³VA's recipe."""

import math

from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from benchmarks import candidates
from benchmarks.candidates import HIGHEST
from benchmarks.methods import cfg_options

SWIN = dict(
    type='mmdet.SwinTransformer', embed_dims=24, depths=(1, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1)
)


def rates(lr, **custom_keys):
    """Of each parameter of a small backbone with a mixer, by name."""
    model = MODELS.build(dict(type='E3VABackbone', backbone=SWIN, adapter=dict(rank=4), mixer=dict(width=8)))
    custom_keys = dict({'norm': dict(decay_mult=0.0)}, **custom_keys)
    config = ConfigDict(
        optimizer=dict(type='AdamW', lr=lr, weight_decay=0.05), paramwise_cfg=dict(custom_keys=custom_keys)
    )
    config.constructor = dict(option.split('=') for option in cfg_options('e3va+ownrate'))['optim_wrapper.constructor']
    wrapper = build_optim_wrapper(model, config)
    by_id = {id(each): group['lr'] for group in wrapper.optimizer.param_groups for each in group['params']}
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_rate_of_its_own():
    for lr, expected in ((1e-4, 1e-3), (1e-3, HIGHEST), (1e-2, HIGHEST)):
        found = rates(lr)
        assert all(math.isclose(found[name], expected) for name in ('highway.1.core', 'mixers.1.0.down.weight'))
        assert found['mixers.1.0.norm.weight'] == found['backbone.norm1.weight'] == lr


def test_it_falls_with_the_fan_in(monkeypatch):
    monkeypatch.setattr(candidates, 'WIDEST', 1)
    found = rates(1e-2)
    fan_ins = dict(down_in=48, core=4, down_out=8, down_bias=8, up_in=24, up_out=8, up_bias=8)
    assert all(math.isclose(found[f'highway.1.{name}'], HIGHEST / fan_in) for name, fan_in in fan_ins.items())
    fan_ins = {'down.weight': 48, 'down.bias': 48, 'filter.convs.1.weight': 25, 'up.weight': 8}
    assert all(math.isclose(found[f'mixers.1.0.{name}'], HIGHEST / fan_in) for name, fan_in in fan_ins.items())


def test_entries_that_name_the_highway_count():
    assert math.isclose(rates(1e-4, highway=dict(lr_mult=0.1))['highway.0.core'], 1e-4)
