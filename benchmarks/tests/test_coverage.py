"""A sample of the stock configs, spread over toolboxes, backbones and models, is put through what all have been."""

import json

import pytest
import torch

from benchmarks.coverage import RESULTS, StockConfig, in_turn, spread_sample
from benchmarks.coverage_tables import format_failures, format_toolboxes, outcomes
from benchmarks.coverage_trial import attempt

CONTENT = json.loads(RESULTS.read_text())
# Packages that tests do without: mmpretrain, lap, scikit-learn, scikit-image.
NEED_MORE = {'ByteTrack', 'OCSORT', 'StrongSORT', 'DeepSORT', 'PAA', 'LAD', 'BoxInst', 'ImageClassifier'}
PASSED = {one.name: CONTENT['configs'][one.name] for one in outcomes(RESULTS) if one.trains and one.rates}
SAMPLE = spread_sample(
    {
        name: record
        for name, record in PASSED.items()
        if record['model'] not in NEED_MORE and 'mmpretrain' not in record['backbone'] and '-l' not in name
    },
    40,
)
TRAINED = SAMPLE[::8]


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize('name', SAMPLE)
def test_a_stock_config_is_tuned_and_built_and_trains_at_its_rate(name):
    config = StockConfig(name)
    assert 'error' not in config.record
    trial = config.trial('e3va', CONTENT['trials'][PASSED[name]['trial']]['stock']['pixels'])
    steps = trial.steps() if name in TRAINED else (trial.build, trial.rates)
    assert attempt(*steps) == {}


@pytest.mark.parametrize('toolbox', ['mmdet', 'mmseg'])
def test_most_stock_configs_are_accepted_and_train(toolbox):
    own = [one for one in outcomes(RESULTS) if one.toolbox == toolbox]
    stock = [one for one in own if one.stock_trains]
    assert sum(one.accepted for one in own) >= 0.95 * len(own)
    assert sum(one.trains for one in stock) >= 0.9 * len(stock)
    assert all(one.rates for one in own if one.accepted and one.rates is not None)


def test_a_highway_at_another_rate_is_found():
    config = StockConfig('mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py')
    config.optim_wrapper['paramwise_cfg'] = {'custom_keys': {'highway.0': {'lr_mult': 0.1}}}
    trial = config.trial('e3va', pixels=64)
    failure = attempt(trial.build, trial.rates)
    assert failure['fails_at'] == 'rates'
    assert 'highway.0.' in failure['error'] and 'of backbone trains at' in failure['error']


def test_a_frozen_parameter_with_a_gradient_is_found():
    trial = StockConfig('mmseg::fcn/fcn_r50-d8_4xb2-40k_cityscapes-512x1024.py').trial('e3va', pixels=64)
    assert attempt(trial.build, trial.rates, trial.initialise, trial.loss) == {}
    weight = trial.model.backbone.backbone.stem[0].weight
    weight.grad = torch.zeros_like(weight)
    assert (
        'frozen parameters have a gradient, such as backbone.backbone.stem.0.weight' in attempt(trial.backward)['error']
    )


def test_a_sample_has_each_backbone_before_a_second_of_any():
    records = {
        f'mmdet::{name}': {'backbone': name[0], 'model': name[1]} for name in ('aa1', 'aa2', 'ab1', 'ba1', 'ca1')
    }
    names = [name.removeprefix('mmdet::') for name in spread_sample(records, 4)]
    assert {name[0] for name in names[:3]} == {'a', 'b', 'c'}
    assert {names[0][:2], names[3][:2]} == {'aa', 'ab'}
    assert in_turn([[1, 2, 3], [4]]) == [1, 4, 2, 3]


def test_whose_fault_a_failure_is(tmp_path):
    failed = {'fails_at': 'loss', 'error': 'ValueError: 7 is odd'}
    missing = {'fails_at': 'build', 'error': 'ImportError: please install lap'}
    trials = {'good': ({}, {}), 'ours': ({}, failed), 'theirs': (failed, failed), 'here': (missing, missing)}
    content = {
        'configs': {
            f'mmdet::{name}.py': {'model': 'M', 'backbone': 'B', 'trial': name, 'rates': 'r'} for name in trials
        },
        'trials': {name: {'stock': stock, 'e3va': tuned, 'wrapped': {}} for name, (stock, tuned) in trials.items()},
        'rates': {'r': {}},
        'device': 'a CPU',
        'date': 'today',
    }
    (path := tmp_path / 'coverage.json').write_text(json.dumps(content))
    faults = {one.name: one.failure and one.failure[0] for one in outcomes(path)}
    assert list(faults.values()) == [None, 'this machine', 'e3va_mm', 'toolbox']
    assert '| MMDetection | 4 | 4 (100.0 %) | 4 (100.0 %) | 2 | 1 (50.0 %) |' in format_toolboxes(path)
    assert '| e3va_mm | 1 | loss | `ValueError: N is odd` | `mmdet::ours.py` |' in format_failures(path)
