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
        ('backbones cpu', 'docs/backbones.md', 'backbones_cpu.json'),
    ],
)
def test_tables_of_the_docs(name, page, file):
    from summarize import summarize

    assert section(name, page) == summarize(json.loads((ROOT / 'results' / file).read_text()))


@pytest.mark.parametrize('name', ['benchmark_gpu', 'benchmark_cpu', 'benchmark_cpu_sizes', 'benchmark_cpu_mixer'])
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
    assert all(values[task, 'E3VA'] > values[task, 'frozen'] for task in ('segmentation', 'detection'))


def test_sentences_on_the_small_sets():
    """What the README says of single seeds."""
    from summarize import values_of

    runs = json.loads((ROOT / 'results/small_sets.json').read_text())['runs'].values()

    def leads(dataset):
        values = {
            (run['seed'], run['method']): values_of(dataset, [run])[0] for run in runs if dataset in run['config']
        }
        seeds = sorted(seed for seed, method in values if method == 'e3va')
        return [round(values[seed, 'e3va'] - values[seed, 'frozen'], 1) for seed in seeds]

    text = ' '.join((ROOT / 'README.md').read_text().split())
    assert (min(leads('bccd')), max(leads('bccd')), len(leads('bccd'))) == (0.8, 1.8, 3)
    assert 'with every seed, by 0.8 to 1.8 points' in text
    assert leads('camvid') == [1.3, 0.1] and 'by 1.3 and 0.1' in text
    assert leads('nuclei') == [-0.1] and '(43.4 and 43.5)' in text


@pytest.mark.parametrize('name', ['small_sets.json', 'rates.json', 'shapes_methods_cpu.json'])
def test_every_result_says_where_it_comes_from(name):
    content = json.loads((ROOT / 'results' / name).read_text())
    for run in content['runs'].values():
        assert {'device', 'torch', 'commit', 'command', 'seed', 'train_args'} <= set(run)
        assert (ROOT / run['config']).is_file()


@pytest.mark.parametrize('name', ['segmentation.png', 'detection.png', 'bars.png'])
def test_pictures_in_the_readme_exist(name):
    assert f'docs/images/{name}' in (ROOT / 'README.md').read_text()
    assert (ROOT / 'docs/images' / name).stat().st_size > 1000
