"""The optimizer's parameter groups."""

import copy
import logging
import math

import pytest
import torch
from conftest import ROOT, e3va, images, stir, swin
from mmengine.config import Config
from mmengine.logging import MessageHub, MMLogger
from mmengine.optim import build_optim_wrapper
from mmengine.optim.scheduler import LinearLR
from mmengine.registry import MODELS

from e3va_mm import optim
from e3va_mm.optim import ADAMW_SHARE, merge_groups

SETTINGS = Config.fromfile(ROOT / 'configs/_base_/schedules/small_sets.py').optim_wrapper


@pytest.fixture(autouse=True)
def no_running_config():
    """Tests before this one may have left theirs."""
    MessageHub.get_current_instance().runtime_info.pop('cfg', None)


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


def test_the_log_has_a_line_a_group_and_none_that_does_not_hold():
    logger, lines = MMLogger.get_current_instance(), []
    listener = logging.Handler()
    listener.emit = lambda record: lines.append(record.getMessage())
    model = segmentor(e3va())
    logger.addHandler(listener)
    try:
        wrapper = build_optim_wrapper(model, settings(backbone=0.1).optim_wrapper)
    finally:
        logger.removeHandler(listener)
    groups = wrapper.optimizer.param_groups
    expected = [f'{len(group["params"])} parameters: ' for group in groups]
    assert not [line for line in lines if 'requires_grad' in line]
    lines = [line for line in lines if 'param' in line]
    assert [line[: len(start)] for line, start in zip(lines, expected)] == expected and len(lines) == len(groups)


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


def rates(wrapper, named):
    """The learning rates of the parameters in a dict, as a set."""
    ids = {id(parameter) for parameter in named.values()}
    groups = wrapper.optimizer.param_groups
    return {group['lr'] for group in groups for parameter in group['params'] if id(parameter) in ids}


def segmentor(backbone):
    model = torch.nn.Module()
    model.backbone, model.decode_head = backbone, torch.nn.Linear(2, 2)
    return model


def settings(constructor='MergedGroupsConstructor', bias_lr_mult=2, **custom_keys):
    keys = {name.replace('__', '.'): dict(lr_mult=mult, decay_mult=0.5) for name, mult in custom_keys.items()}
    paramwise_cfg = dict(custom_keys=keys, bias_lr_mult=bias_lr_mult)
    optimizer = dict(type='AdamW', lr=1e-3, weight_decay=0.1)
    return Config(dict(optim_wrapper=dict(constructor=constructor, optimizer=optimizer, paramwise_cfg=paramwise_cfg)))


def test_what_is_added_learns_at_the_base_rate():
    """Entries for the backbone are for what the stock backbone has, those for the head stay the head's."""
    model = segmentor(e3va(mixer=dict(width=8)))
    keys = dict(backbone=0, backbone__norm=0.1, norm=0.1, decode_head=10)
    wrapper = build_optim_wrapper(model, settings(**keys).optim_wrapper)
    assert rates(wrapper, model.backbone.base_rate_parameters()) == {1e-3}
    assert rates(wrapper, dict(model.decode_head.named_parameters())) == {1e-2}
    decays = {group['weight_decay'] for group in wrapper.optimizer.param_groups}
    assert decays == {0.05} and all('lr_mult' not in g or g['lr'] == 1e-2 for g in wrapper.optimizer.param_groups)


def highway_rates(lr, **custom_keys):
    """Of each parameter that learns in a small backbone with mixers, by name."""
    model = segmentor(e3va(adapter=dict(rank=4), mixer=dict(width=8)))
    config = settings('HighwayRatesConstructor', **custom_keys).optim_wrapper
    config.optimizer.lr = lr
    wrapper = build_optim_wrapper(model, config)
    of = {id(each): group['lr'] for group in wrapper.optimizer.param_groups for each in group['params']}
    return {name: of[id(each)] for name, each in model.named_parameters() if each.requires_grad}


@pytest.mark.parametrize(('lr', 'expected'), [(1e-4, 1e-3), (1e-3, 5e-3), (1e-2, 5e-3)])
def test_a_rate_for_highways_with_mixers(lr, expected):
    found = highway_rates(lr)
    assert all(math.isclose(found[f'backbone.{name}'], expected) for name in ('highway.1.core', 'mixers.1.0.up.weight'))
    norms = 'mixers.1.0.norm.weight', 'backbone.norm1.weight'
    assert all(found[f'backbone.{name}'] == found['decode_head.weight'] == lr for name in norms)


def test_it_falls_with_the_fan_in(monkeypatch):
    monkeypatch.setattr(optim, 'WIDEST', 1)
    found = highway_rates(1e-3)
    width = e3va().highway[1].up_out.shape[-1]
    sums = dict(down_in=width, core=4, down_out=8, down_bias=8, up_in=width // 2, up_out=8, up_bias=8)
    sums = {f'highway.1.{name}': number for name, number in sums.items()}
    mixer = {'down.weight': width, 'down.bias': width, 'filter.convs.1.weight': 25, 'up.weight': 8}
    sums.update({f'mixers.1.0.{name}': number for name, number in mixer.items()})
    assert {name: found[f'backbone.{name}'] for name in sums} == pytest.approx({n: 0.005 / k for n, k in sums.items()})


def test_it_needs_no_settings_for_single_parameters():
    model = segmentor(e3va(mixer=dict(width=8)))
    config = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.002), constructor='HighwayRatesConstructor')
    wrapper = build_optim_wrapper(model, config)
    assert rates(wrapper, dict(model.decode_head.named_parameters())) == {0.002}
    (rate,) = rates(wrapper, {'core': model.backbone.highway[0].core})
    assert math.isclose(rate, 10 * ADAMW_SHARE * 0.002)


def test_an_entry_that_names_the_highway_takes_its_rate():
    found = highway_rates(1e-4, highway=0.5)
    assert found['backbone.highway.0.core'] == 5e-5 and math.isclose(found['backbone.mixers.0.0.up.weight'], 1e-3)


@pytest.mark.parametrize('key', ['backbone__mixers', 'mixers'])
def test_an_entry_that_names_a_part_holds(key):
    model = segmentor(e3va(mixer=dict(width=8)))
    wrapper = build_optim_wrapper(model, settings(backbone=0.1, **{key: 5}).optim_wrapper)
    backbone = model.backbone
    assert rates(wrapper, dict(backbone.mixers.named_parameters())) == {5e-3}
    assert rates(wrapper, dict(backbone.highway.named_parameters())) == {1e-3}
    norms = {
        f'{name}.{part}': value
        for name in backbone.family.norm_names
        for part, value in backbone.backbone.get_submodule(name).named_parameters()
    }
    assert norms and rates(wrapper, norms) == {1e-3}


@pytest.mark.parametrize('method', ['LoRA', 'Mona', 'BitFit', 'NormTuning', 'Partial'])
def test_methods_add_at_the_base_rate_and_tune_the_backbone_at_its_own(method):
    model = segmentor(MODELS.build(dict(type='TunedBackbone', backbone=swin(), method=dict(type=method))))
    wrapper = build_optim_wrapper(model, settings(backbone=0.1).optim_wrapper)
    added = model.backbone.base_rate_parameters()
    stock = {n: p for n, p in model.backbone.named_parameters() if p.requires_grad and n not in added}
    assert bool(added) == (method in ('LoRA', 'Mona')) != bool(stock)
    assert rates(wrapper, added or stock) == {1e-3 if added else 1e-4}


@pytest.fixture
def running():
    """Makes a config the running one, as mmengine's runner does."""
    hub = MessageHub.get_current_instance()
    yield lambda config: hub.update_info('cfg', config.pretty_text)
    hub.runtime_info.pop('cfg', None)


def first_step(config):
    """Builds the optimizer of a config and takes a step with it; those of other models have stepped before."""
    model = segmentor(e3va(mixer=dict(width=8)))
    torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=1).step()
    build_optim_wrapper(model.decode_head, config.optim_wrapper).optimizer.step()
    optimizer = build_optim_wrapper(model, config.optim_wrapper).optimizer
    for parameter in model.backbone.adapter_parameters().values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize('factor', [0, 0.1, 3])
def test_a_factor_for_the_backbone_ends_training_at_its_first_step(running, factor):
    config = settings('DefaultOptimWrapperConstructor', backbone=factor, decode_head=7)
    running(config)
    with pytest.raises(
        ValueError, match=rf"custom_keys\['backbone'\] .* gives the highway {factor} .*'backbone.highway'"
    ):
        first_step(config)


def test_layer_decay_of_others_ends_training_too(running):
    config = settings('DefaultOptimWrapperConstructor')
    running(config)
    model = segmentor(e3va())
    optimizer = torch.optim.SGD([dict(params=model.parameters(), lr_scale=0.9)], lr=1)
    with pytest.raises(ValueError, match='^layer decay in optim_wrapper is .* gives the highway 0.9 of'):
        optimizer.step()


@pytest.mark.parametrize('keys', [dict(backbone=1), dict(backbone=0.1, backbone__highway=1, backbone__mixers=10)])
def test_a_chosen_factor_passes(running, keys):
    config = settings('DefaultOptimWrapperConstructor', **keys)
    running(config)
    # A step that was refused would have left no state.
    assert first_step(config).state


def test_rates_are_looked_at_once(running):
    config = settings('DefaultOptimWrapperConstructor')
    running(config)
    optimizer = first_step(config)
    for group in optimizer.param_groups:
        group['lr_mult'] = 0.1
    before = [state['step'].item() for state in optimizer.state.values()]
    optimizer.step()
    assert [state['step'].item() for state in optimizer.state.values()] == [step + 1 for step in before] != []


def test_warm_up_and_scaled_rates_are_no_factors(running):
    config = settings('DefaultOptimWrapperConstructor', decode_head=10)
    running(config)
    wrapper = build_optim_wrapper(segmentor(e3va()), config.optim_wrapper)
    for group in wrapper.optimizer.param_groups:
        group['lr'] *= 0.125  # --auto-scale-lr
    LinearLR(wrapper.optimizer, start_factor=0.001, end=5)
    head = wrapper.optimizer.param_groups[-1]['params'][0]
    head.grad = torch.ones_like(head)
    before = head.detach().clone()
    wrapper.optimizer.step()
    assert not torch.equal(head, before)


def sgd_settings(**paramwise_cfg):
    optimizer = dict(type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4)
    config = dict(constructor='MergedGroupsConstructor', optimizer=optimizer, paramwise_cfg=paramwise_cfg or None)
    return Config(dict(optim_wrapper=config)).optim_wrapper


def by_name(model, optimizer):
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group['params']}
    return {name: groups[id(p)] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    'paramwise_cfg', [{}, dict(norm_decay_mult=0.0), dict(custom_keys=dict(backbone=dict(lr_mult=0.1)))]
)
def test_beside_sgd_what_is_added_is_trained_by_adamw(paramwise_cfg):
    torch.manual_seed(0)
    model = segmentor(stir(e3va(mixer=dict(width=8))))
    wrapper = build_optim_wrapper(model, sgd_settings(**paramwise_cfg))
    groups = by_name(model, wrapper.optimizer)
    added = {name for name, group in groups.items() if group.get('adaptive')}
    assert added == {f'backbone.{name}' for name in model.backbone.adapter_parameters()}
    assert {groups[name]['lr'] for name in added} == {0.02 * ADAMW_SHARE}
    assert {groups[name]['lr'] for name in groups.keys() - added} == {0.02}

    expected = copy.deepcopy(model)
    adamw, sgd = [], []
    for name, parameter in expected.named_parameters():
        if parameter.requires_grad:
            group = dict(params=[parameter], weight_decay=groups[name]['weight_decay'])
            (adamw if name in added else sgd).append(group)
    references = torch.optim.AdamW(adamw, lr=0.02 * ADAMW_SHARE), torch.optim.SGD(sgd, lr=0.02, momentum=0.9)

    def loss(model):
        maps = model.backbone(images())
        return sum(each.square().mean() for each in maps) + sum(
            each.square().sum() for each in model.decode_head.parameters()
        )

    for _ in range(3):
        wrapper.update_params(loss(model))
        loss(expected).backward()
        for optimizer in references:
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), expected.parameters()))

    # A checkpoint and a copy go on as the original does.
    resumed = copy.deepcopy(model)
    other = build_optim_wrapper(resumed, sgd_settings(**paramwise_cfg))
    other.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    for each, optimizer in ((model, wrapper), (resumed, other)):
        optimizer.update_params(loss(each))
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), resumed.parameters()))


def test_sgd_of_what_nothing_is_added_to_stays():
    backbone = MODELS.build(dict(type='TunedBackbone', backbone=swin(), method=dict(type='BitFit')))
    for model in (segmentor(backbone), segmentor(torch.nn.Linear(2, 2))):
        assert type(build_optim_wrapper(model, sgd_settings()).optimizer) is torch.optim.SGD


def test_plain_sgd_is_told_of(monkeypatch):
    said = []
    monkeypatch.setattr(
        'e3va_mm.optim.print_log', lambda message, **_: said.append(message) if 'hardly' in message else None
    )
    model = segmentor(e3va())
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.02).step()
    assert len(said) == 1
    build_optim_wrapper(model, sgd_settings()).optimizer.step()
    torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02).step()
    assert len(said) == 1
