"""The README's tables are what the committed scripts make of the committed results."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'tools'))


def section(name: str, page: str = 'README.md') -> str:
    text = (ROOT / page).read_text()
    return text.split(f'<!-- {name} -->')[1].split(f'<!-- end of {name} -->')[0].strip()


def test_results_table():
    from summarize import summarize

    content = json.loads((ROOT / 'results/small_sets.json').read_text())
    assert section('results table') == summarize(content)


@pytest.mark.parametrize(
    ('name', 'page', 'file'),
    [
        ('shapes methods', 'docs/methods.md', 'shapes_methods_cpu.json'),
        ('camvid cpu', 'docs/methods.md', 'camvid_cpu.json'),
        ('rates', 'docs/methods.md', 'rates.json'),
        ('guard', 'docs/performance.md', 'guard.json'),
        ('backbones cpu', 'docs/backbones.md', 'backbones_cpu.json'),
    ],
)
def test_tables_of_the_docs(name, page, file):
    from summarize import summarize

    assert section(name, page) == summarize(json.loads((ROOT / 'results' / file).read_text()))


@pytest.mark.parametrize(
    'name', ['benchmark_gpu', 'benchmark_vit', 'benchmark_cpu', 'benchmark_cpu_sizes', 'benchmark_cpu_mixer']
)
def test_performance_tables(name):
    from summarize_benchmark import report

    assert section(name, 'docs/performance.md') == report(ROOT / f'results/{name}.json')


def test_performance_in_the_readme():
    from summarize_benchmark import load_rows

    text = (ROOT / 'README.md').read_text()
    rows = [row for row in load_rows(ROOT / 'results/benchmark_gpu.json') if row['batch_size'] == 8]
    names = ('full', 'frozen', 'e3va', 'e3va+bf16', 'e3va+bf16+taps-float8')
    for row in rows:
        if row['precision'] == 'fp32' and row['method'] in names:
            assert f'{row["peak_memory_mib"] / 1024:.1f} GiB / {1000 * row["step_seconds"]:.0f} ms' in text


def test_demo_table():
    from demo import format_table

    content = json.loads((ROOT / 'results/demo.json').read_text())
    assert section('demo table') == format_table(content['rows'])
    values = {(row['task'], row['method']): row['value'] for row in content['rows']}
    assert all(values[task, 'E3VA + mixer'] > values[task, 'frozen'] for task in ('segmentation', 'detection'))


def test_mixers_tell_the_demo_from_frozen():
    from summarize import group_runs, values_of

    content = json.loads((ROOT / 'results/shapes_methods_cpu.json').read_text())
    for dataset, methods in group_runs(content).items():
        values = {name: values_of(dataset, methods[name]) for name in ('frozen', 'e3va+mixer')}
        assert len(values['e3va+mixer']) >= 2 and min(values['e3va+mixer']) > max(values['frozen'])


def test_sentences_on_the_small_sets():
    """What the README says of means and single seeds."""
    from summarize import values_of

    runs = json.loads((ROOT / 'results/small_sets.json').read_text())['runs'].values()
    values = {}
    for run in runs:
        dataset = run['config'].split('/')[1]
        (values[dataset, run['method'], run['seed']],) = values_of(dataset, [run])

    def leads(dataset, method, other):
        return [round(values[dataset, method, seed] - values[dataset, other, seed], 1) for seed in (0, 1, 2)]

    def mean_lead(dataset, method, other):
        difference = sum(values[dataset, method, seed] - values[dataset, other, seed] for seed in (0, 1, 2))
        return round(difference / 3, 1)

    text = ' '.join((ROOT / 'README.md').read_text().split())
    sets = ('camvid', 'bccd', 'nuclei')
    assert [mean_lead(name, 'e3va', 'frozen') for name in sets] == [0.4, 1.2, 0.3]
    assert 'by 0.4 points on CamVid, 1.2 on BCCD and 0.3 on nuclei' in text
    assert [mean_lead(name, 'full', 'e3va') for name in sets] == [1.5, 3.4, 0.8]
    assert 'by 1.5, 3.4 and 0.8 points more' in text
    assert (min(leads('bccd', 'e3va', 'frozen')), max(leads('bccd', 'e3va', 'frozen'))) == (0.8, 1.8)
    for name in ('camvid', 'nuclei'):
        assert sorted(leads(name, 'e3va', 'frozen'))[0] == -0.1 and sorted(leads(name, 'e3va', 'frozen'))[1] > 0


def test_options_cost_no_accuracy():
    """The guard of the fast options, which chose the default of ``frozen_dtype``."""
    from summarize import group_runs, values_of

    content = json.loads((ROOT / 'results/guard.json').read_text())
    for dataset, methods in group_runs(content).items():
        means = {name: sum(values_of(dataset, runs)) / len(runs) for name, runs in methods.items()}
        assert {len(runs) for runs in methods.values()} == {3} and len(means) == 4
        assert all(abs(mean - means['e3va']) < 0.3 for mean in means.values()), (dataset, means)


@pytest.mark.parametrize('name', ['small_sets.json', 'guard.json', 'rates.json', 'shapes_methods_cpu.json'])
def test_every_result_says_where_it_comes_from(name):
    content = json.loads((ROOT / 'results' / name).read_text())
    for run in content['runs'].values():
        assert {'device', 'torch', 'commit', 'command', 'seed', 'train_args'} <= set(run)
        assert (ROOT / run['config']).is_file()


@pytest.mark.parametrize('name', ['segmentation.png', 'detection.png', 'bars.png'])
def test_pictures_in_the_readme_exist(name):
    assert f'docs/images/{name}' in (ROOT / 'README.md').read_text()
    assert (ROOT / 'docs/images' / name).stat().st_size > 1000
