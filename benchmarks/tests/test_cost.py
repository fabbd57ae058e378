"""The benchmark tool, run as a user runs it, on a model of seconds."""

import argparse
import json
import re
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config

from benchmarks import cost, measure
from benchmarks.bench import Bench
from benchmarks.methods import backbone_of
from e3va_mm.hooks.report import count_parameters

from .conftest import script

CONFIG = 'configs/shapes/swin-nano_upernet_1xb8-600_shapes-96x96.py'
CASE = dict(config=CONFIG, precision='fp32', image_size=[96, 96], data='synthetic', cfg_options={})
SMALL = ['--tasks', '--configs', CONFIG, '--image-sizes', '64x96', '--batch-sizes', '2', '--warmup', '1']


def test_results_say_what_was_measured_and_where(tmp_path):
    out = tmp_path / 'out.json'
    command = ['benchmarks/cost.py', '--out', out, *SMALL, '--steps', '2', '--methods', 'full', 'e3va+taps-float8']
    assert script(*command).count('| full fine-tuning | ') == 1
    kept = {}
    for case in json.loads(out.read_text())['cases'].values():
        (run,) = case['runs']
        kept[case['method']] = run['saved_in_backbone_mib']
        assert case['commit'] and case['command'] and case['device'] and case['torch'] and case['date']
        assert run['peak_memory_mib'] > 100 and 0 < run['step_seconds'] < 60
    assert 0 < 10 * kept['e3va+taps-float8'] < kept['full']


def test_steps_in_turn(tmp_path):
    out = tmp_path / 'out.json'
    command = ['benchmarks/cost.py', '--measure', 'in-turn', '--out', out, *SMALL, '--steps', '3']
    command += ['--methods', 'e3va', 'full', '--repeats']
    log = script(*command, 2)
    assert log.count('of_first_quartiles') == 4
    (plain, _), (full, again) = (case['runs'] for case in json.loads(out.read_text())['cases'].values())
    assert plain['of_first'] == 1 and full['of_first_quartiles'][0] <= full['of_first'] <= full['of_first_quartiles'][1]
    seconds, ratio = ((full[key] + again[key]) / 2 for key in ('step_seconds', 'of_first'))
    assert f'| {1000 * seconds:.0f} ms | {ratio:.2f} (' in log


def test_several_processes(tmp_path):
    """Each with a batch of its own; frozen blocks whole, or sharded."""
    out = tmp_path / 'out.json'
    norms = [f'model.{head}.norm_cfg.type=BN' for head in ('decode_head', 'auxiliary_head')]
    command = ['benchmarks/cost.py', '--out', out, *SMALL, '--steps', '2', '--cfg-options', *norms]
    log = script(*command, '--gpus', '2', '--methods', 'e3va')
    (case,) = json.loads(out.read_text())['cases'].values()
    alone, _, together = times = [case['runs'][0][f'{name}_seconds'] for name in ('alone', 'apart', 'step')]
    columns = r' \| '.join(rf'{1000 * seconds:.0f} ms \(\d+–\d+\)' for seconds in times)
    assert case['gpus'] == 2 and re.search(columns, log)
    assert log.strip().endswith(f' | {alone / together:.2f} |')
    log = script(*command, '--gpus', '2', '--methods', 'e3va+sharded')
    assert '| E³VA, frozen blocks sharded | 2 | ' in log and 'MiB |  |  | ' in log


def test_sizes_of_images_together(tmp_path):
    """In one process; what the file has already is not measured again."""
    out = tmp_path / 'out.json'
    command = ['benchmarks/cost.py', '--out', out, *SMALL, '--steps', '2', '--methods', 'e3va', '--together']
    script(*command)
    script(*command, '--image-sizes', '64x96', '96x128', '128x192')
    cases = json.loads(out.read_text())['cases'].values()
    assert [case['image_size'] for case in cases] == [[64, 96], [96, 128], [128, 192]]
    kept = [[run['saved_in_backbone_mib'] for run in case['runs']] for case in cases]
    assert [len(runs) for runs in kept] == [1, 1, 1] and 1.2 * 1.2 * kept[0][0] < 1.2 * kept[1][0] < kept[2][0]


def test_another_checkout_is_measured(tmp_path):
    """With its package, whatever benchmarks it has, and not with ours."""
    for name, text in (('e3va_mm', "raise ImportError('theirs')"), ('benchmarks', "raise ImportError('not ours')")):
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text(text)
    command = ['benchmarks/cost.py', '--out', tmp_path / 'out.json', *SMALL, '--methods', 'e3va']
    log = script(*command, '--packages', f'before={tmp_path}', ok=False)
    assert 'synthetic, before failed:' in log and 'ImportError: theirs' in log


@pytest.mark.parametrize('guess', [-3, 1, 6, 7, 30])
@pytest.mark.parametrize('limit', [0, 6, 40])
def test_largest_batch(guess, limit):
    tried = []
    found = measure.largest_batch(lambda images: tried.append(images) or images <= limit, guess, 2, 32)
    assert found == (0 if limit < 2 else min(limit, 32)) and len(tried) == len(set(tried)) and min(tried) >= 2


def test_fits_by_card(monkeypatch):
    """Weights of 6 GB, and 2 GB an image."""
    caps = []
    monkeypatch.setattr(measure, 'Bench', lambda case: SimpleNamespace(config=Config(dict(default_scope='mmdet'))))
    monkeypatch.setattr(measure, 'limit_memory', caps.append)
    monkeypatch.setattr(measure, 'fits_device', lambda bench: caps[-1] > 6e9)

    def trains(bench, images, peaks):
        peaks[images] = 6e9 + 2e9 * images
        return peaks[images] < caps[-1] or peaks.pop(images) < 0

    monkeypatch.setattr(measure, 'trains', trains)
    monkeypatch.setattr(measure, 'cost', lambda bench, case: {'batch_size': case['batch_size']})
    (found,) = measure.measure_fits([{'cards': [24, 4, 8, 80], 'most_images': 16}])
    assert found['largest'] == {4: 0, 8: 0, 24: 8, 80: 16} and found['taken_gib'] == 0.5
    assert found['cost'] == {'batch_size': 1}


def test_peaks_are_extrapolated():
    assert measure.extrapolate({2: 500, 4: 900, 1: 400}, 2000) == 9
    assert measure.extrapolate({2: 500, 4: 900}, 600) == 3


@pytest.mark.parametrize('method', ['full', 'frozen', 'e3va'])
def test_gradients_are_those_of_what_is_trained(method):
    case = dict(CASE, backbone=backbone_of(method))
    (found,) = measure.measure_gradients([case])
    trained = {part: count['trainable'] for part, count in count_parameters(Bench(case).model).items()}
    assert found['gradients_mib'] * measure.MIB == 4 * sum(trained.values())
    assert found['backbone_mib'] * measure.MIB == 4 * (trained['backbone'] + trained.get('highway', 0))


def test_methods_share_heads_and_batches():
    """Nothing is learnt, so a head whose work depends on what it predicts has the same of it in every step."""
    losses = []
    for method in ('frozen', 'e3va', 'e3va'):
        bench = Bench(dict(CASE, backbone=backbone_of(method)))
        bench.to_device()
        bench.load_batch(2)
        if losses:
            bench.step()
        torch.manual_seed(0)  # for the head's dropout
        losses.append(bench.model.parse_losses(bench.model(**bench.batch, mode='loss'))[0].item())
    assert losses[0] > 0.1 and losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_masks_come_from_the_host_in_each_step():
    """A byte a pixel, as a loader has them; moved at each crop, or once a step."""
    case = dict(CASE, config='configs/nuclei/mask-rcnn_swin-nano_fpn_1xb8-300_nuclei.py', image_size=[64, 96])
    case['cfg_options'] = {'model.train_cfg.rcnn.sampler.num': 16}
    kinds = []
    for method in ('full', 'full+masks'):
        bench = Bench(dict(case, method=method, backbone=backbone_of(method)))
        bench.to_device()
        bench.load_batch(2)
        instances = bench.batch['data_samples'][0].gt_instances
        seen = [bench.step() or instances.masks for _ in range(2)]
        assert all(masks.masks.dtype == 'uint8' and 0 < masks.masks.mean() < 1 for masks in seen)
        kinds.append([type(masks).__name__ for masks in seen])
    assert kinds == [['BitmapMasks'] * 2, ['DeviceMasks'] * 2]
    assert seen[0] is not seen[1] and all(masks._moved is not None for masks in seen)


def test_every_task_and_size_has_its_config():
    args = argparse.Namespace(configs=[], tasks=list(cost.TASKS), sizes=list(cost.SIZES))
    assert len(cost.models(args)) == 12


def test_other_cards_are_measured_anew(tmp_path, monkeypatch):
    """And what the file had of a case goes when its successor is there, no sooner."""
    out, results = tmp_path / 'out.json', []
    monkeypatch.setattr(cost, 'run_job', lambda *args: results.pop(0))

    def run(*cards):
        options = ['--measure', 'fits', '--out', str(out), '--cards', *cards, *SMALL, '--methods', 'full']
        monkeypatch.setattr('sys.argv', ['cost.py', *options])
        cost.main()
        (case,) = json.loads(out.read_text())['cases'].values()
        return case['cards'], case['runs']

    old, new = ({'largest': largest, 'most_images': 16} for largest in ({'8': 2}, {'8': 2, '48': 9}))
    results.append([old])
    assert run('8') == run('8') == ([8], [old])
    results.append('out of memory')
    with pytest.raises(SystemExit):
        run('8', '48')
    results.append([new])
    assert run('8', '48') == ([8, 48], [new])
