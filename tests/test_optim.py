"""The optimizer's parameter groups."""

import copy

import pytest
import torch
from conftest import ROOT, e3va, images, stir
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper

from e3va_mm.optim import merge_groups

SETTINGS = Config.fromfile(ROOT / 'configs/_base_/schedules/small_sets.py').optim_wrapper


def optim_wrapper(model, constructor, **options):
    custom_keys = {**SETTINGS.paramwise_cfg.custom_keys, 'mixers': dict(lr_mult=3)}
    paramwise_cfg = dict(custom_keys=custom_keys)
    config = dict(copy.deepcopy(SETTINGS), constructor=constructor, paramwise_cfg=paramwise_cfg, **options)
    return build_optim_wrapper(model, Config(dict(optim_wrapper=config)).optim_wrapper)


def settings_of(wrapper):
    return {
        id(parameter): (group['lr'], group['weight_decay'])
        for group in wrapper.optimizer.param_groups
        for parameter in group['params']
    }


def test_each_parameter_keeps_its_settings_in_few_groups():
    model = e3va(mixer=dict(width=8))
    merged, stock = (
        optim_wrapper(model, name) for name in ('MergedGroupsConstructor', 'DefaultOptimWrapperConstructor')
    )
    assert settings_of(merged) == settings_of(stock)
    assert len(merged.optimizer.param_groups) == 3 < len(stock.optimizer.param_groups)
    assert {len(group['params']) for group in stock.optimizer.param_groups} == {1}


@pytest.mark.parametrize('accumulated', [1, 2])
def test_trains_as_with_the_stock_constructor(accumulated):
    trained = []
    for name in ('MergedGroupsConstructor', 'DefaultOptimWrapperConstructor'):
        torch.manual_seed(0)
        model = stir(e3va(mixer=dict(width=8))).double()
        wrapper = optim_wrapper(model, name, accumulative_counts=accumulated)
        for _ in range(4):
            wrapper.update_params(sum(output.square().mean() for output in model(images().double())))
        trained.append({key: value.detach() for key, value in model.adapter_parameters().items()})
    torch.testing.assert_close(*trained)


def test_groups_with_settings_that_can_not_be_hashed():
    groups = [dict(params=[number], betas=betas) for number, betas in enumerate(([0.9], [0.8], [0.9]))]
    assert merge_groups(groups) == [dict(params=[0, 2], betas=[0.9]), dict(params=[1], betas=[0.8])]
