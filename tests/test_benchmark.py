"""The benchmark tool, run as a user runs it, on a model of seconds."""

import argparse
import json

import benchmark
import benchmark_case
import pytest
import summarize_benchmark
import torch
from conftest import tool
from method_specs import backbone_of

CONFIG = 'configs/shapes/swin-nano_upernet_1xb8-600_shapes-96x96.py'


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp('benchmark') / 'out.json'
    command = ['tools/benchmark.py', '--out', out, '--tasks', '--configs', CONFIG, '--image-sizes', '64x96']
    command += ['--batch-sizes', '2', '--steps', '2', '--warmup', '1', '--methods']
    log = tool(*command, 'full', 'e3va', 'e3va+taps-float8')
    assert log.count(' MiB, ') == 3
    assert tool(*command, 'full') == ''
    return out


def test_results_say_what_was_measured_and_where(results):
    cases = json.loads(results.read_text())['cases']
    assert len(cases) == 3
    kept = {}
    for case in cases.values():
        (run,) = case['runs']
        kept[case['method']] = run['saved_in_backbone_mib']
        assert case['commit'] and case['command'] and case['device'] and case['torch']
        assert run['peak_memory_mib'] > 100 and 0 < run['step_seconds'] < 60
        assert set(run['phases']) >= {'neck_and_head', 'backward', 'optimizer'}
        assert ('highway' in run['phases']) == (case['method'] != 'full')
    assert 10 * kept['e3va+taps-float8'] < kept['full']
    assert kept['e3va+taps-float8'] < kept['e3va']


def test_steps_in_turn(tmp_path):
    out = tmp_path / 'out.json'
    command = ['tools/benchmark_steps.py', '--out', out, '--tasks', '--configs', CONFIG, '--image-sizes', '64x96']
    command += ['--batch-sizes', '2', '--steps', '3', '--warmup', '1', '--methods', 'e3va', 'full']
    assert tool(*command).count(' of the first') == 2
    assert ' of the first' not in tool(*command)  # it is there already
    assert tool(*command, '--repeats', '2').count(' of the first') == 2
    (plain, _), (full, again) = (case['runs'] for case in json.loads(out.read_text())['cases'].values())
    assert plain['of_first'] == 1 and full['of_first_quartiles'][0] <= full['of_first'] <= full['of_first_quartiles'][1]
    assert 0 < plain['step_seconds'] < 60
    seconds, ratio = ((full[key] + again[key]) / 2 for key in ('step_seconds', 'of_first'))
    assert f'| full | {1000 * seconds:.0f} ms | {ratio:.2f} (' in tool('tools/summarize_benchmark.py', out)


def test_methods_share_heads_and_batches():
    """Nothing is learnt, so a head whose work depends on what it predicts has the same of it in every step."""
    case = dict(config=CONFIG, precision='fp32', image_size=[96, 96], data='synthetic', cfg_options={})
    losses = []
    for method in ('frozen', 'e3va', 'e3va'):
        bench = benchmark_case.Bench(dict(case, backbone=backbone_of(method)))
        bench.to_device()
        bench.load_batch(2)
        if losses:
            bench.step()
        torch.manual_seed(0)  # for the head's dropout
        losses.append(bench.model.parse_losses(bench.model(**bench.batch, mode='loss'))[0].item())
    assert losses[0] > 0.1 and losses == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_table_and_plots(results, tmp_path):
    printed = tool('tools/summarize_benchmark.py', results, '--plots', tmp_path)
    assert '| full | ' in printed and '| e3va+taps-float8 | ' in printed
    assert all(path.stat().st_size > 5000 for path in tmp_path.glob('*.png')) and list(tmp_path.glob('*.png'))


def test_ratios(tmp_path):
    case = dict(
        model='m', image_size=[8, 8], data='synthetic', precision='fp32', batch_size=1, memory_cap=None, device='cpu'
    )
    run = dict(step_seconds=1, step_seconds_quartiles=[1, 1], saved_in_backbone_mib=1, batch_size=1)
    memory = {'full': [100], 'e3va': [40, 60]}
    cases = {
        method: {**case, 'method': method, 'runs': [{**run, 'peak_memory_mib': mib} for mib in mibs]}
        for method, mibs in memory.items()
    }
    path = tmp_path / 'results.json'
    path.write_text(json.dumps({'cases': cases}))
    tables = summarize_benchmark.format_tables(summarize_benchmark.load_rows(path))
    assert '| e3va | 50 MiB | 0.50 |' in tables and 'batch 1, ' in tables


def test_every_task_and_size_has_its_config():
    args = argparse.Namespace(configs=[], tasks=list(benchmark.TASKS), sizes=list(benchmark.SIZES))
    assert len(benchmark.models(args)) == 12
