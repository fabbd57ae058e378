"""What is tried for E³VA's recipe."""

import math

import torch
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS

from benchmarks.candidates import HIGHEST, OWN_RATE, REFERENCE
from benchmarks.methods import cfg_options

SWIN = dict(
    type='mmdet.SwinTransformer', embed_dims=24, depths=(1, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1)
)


def rates(lr, method='e3va+fanin', **custom_keys):
    """Of each parameter of a small backbone with a mixer, by name."""
    model = build(type='E3VABackbone', adapter=dict(rank=4), mixer=dict(width=8))
    custom_keys = dict({'norm': dict(decay_mult=0.0)}, **custom_keys)
    config = ConfigDict(
        optimizer=dict(type='AdamW', lr=lr, weight_decay=0.05), paramwise_cfg=dict(custom_keys=custom_keys)
    )
    config.constructor = dict(option.split('=') for option in cfg_options(method))['optim_wrapper.constructor']
    wrapper = build_optim_wrapper(model, config)
    by_id = {id(each): group['lr'] for group in wrapper.optimizer.param_groups for each in group['params']}
    return {name: by_id[id(parameter)] for name, parameter in model.named_parameters() if parameter.requires_grad}


def build(**options):
    torch.manual_seed(0)
    return MODELS.build(dict(backbone=SWIN, **options))


def test_normalised_taps_start_at_the_frozen_maps_and_scale_with_the_backbone():
    plain, normalised = (build(type=name) for name in ('E3VABackbone', 'NormalisedE3VABackbone'))
    images = torch.randn(2, 3, 64, 96)
    assert all(torch.equal(*maps) for maps in zip(plain(images), normalised(images)))

    adapters, generator = normalised.highway[0], torch.Generator().manual_seed(0)
    torch.nn.init.normal_(adapters.up_out, generator=generator)
    taps, end = torch.randn(2, 1, 5, 24), torch.randn(1, 5, 24)

    def delta(tap_scale, end_scale):
        record = adapters.record()
        for tap in taps:
            record.add(tap_scale * tap)
        record.stage_end = end_scale * end
        return adapters(record)

    reference = delta(1, 1)
    assert torch.allclose(delta(100, 1), reference, rtol=1e-3) and torch.allclose(delta(1, 3), 3 * reference)
    reference.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in adapters.parameters())


def test_rates_fall_with_the_fan_in():
    found = rates(1e-4)
    unit = 1e-4 * REFERENCE
    fan_ins = dict(down_in=48, core=4, down_out=8, down_bias=8, up_in=24, up_out=8, up_bias=8)
    assert all(math.isclose(found[f'highway.1.{name}'], unit / fan_in) for name, fan_in in fan_ins.items())
    fan_ins = {'down.weight': 48, 'down.bias': 48, 'filter.convs.1.weight': 25, 'up.weight': 8}
    assert all(math.isclose(found[f'mixers.1.0.{name}'], unit / fan_in) for name, fan_in in fan_ins.items())
    assert found['mixers.1.0.norm.weight'] == found['backbone.norm1.weight'] == 1e-4


def test_the_highway_has_a_highest_rate_and_entries_that_name_it_count():
    assert math.isclose(rates(1e-2)['highway.0.core'], HIGHEST * REFERENCE / 4)
    assert rates(1e-2)['backbone.norm1.weight'] == 1e-2
    assert math.isclose(rates(1e-4, highway=dict(lr_mult=0.1))['highway.0.core'], 1e-5 * REFERENCE / 4)


def test_a_rate_of_its_own():
    for lr, expected in ((1e-4, 1e-3), (1e-3, OWN_RATE), (1e-2, OWN_RATE)):
        found = rates(lr, 'e3va+ownrate')
        assert all(math.isclose(found[name], expected) for name in ('highway.1.core', 'mixers.1.0.down.weight'))
        assert found['mixers.1.0.norm.weight'] == found['backbone.norm1.weight'] == lr
