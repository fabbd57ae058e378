"""The README's tables are what the committed scripts make of the committed results."""

import json
import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / 'tools'))


def test_tables_are_those_of_the_results():
    from update_docs import updated_pages

    for page, text in updated_pages().items():
        assert (ROOT / page).read_text() == text, f'{page}: run tools/update_docs.py'


def test_a_missing_section_is_named():
    from update_docs import replace_section

    assert replace_section('a\n<!-- t -->\nold\n<!-- end of t -->\nb', 't', 'new').split('\n')[2] == 'new'
    with pytest.raises(ValueError, match='<!-- other -->'):
        replace_section('<!-- t --><!-- end of t -->', 'other', 'new')


def test_demo():
    content = json.loads((ROOT / 'results/demo.json').read_text())
    values = {(row['task'], row['method']): row['value'] for row in content['rows']}
    assert all(values[task, 'E3VA + mixer'] > values[task, 'frozen'] for task in ('segmentation', 'detection'))


def test_mixers_tell_the_demo_from_frozen():
    from summarize import group_runs, values_of

    content = json.loads((ROOT / 'results/shapes_methods_cpu.json').read_text())
    for dataset, methods in group_runs(content).items():
        values = {name: values_of(dataset, methods[name]) for name in ('frozen', 'e3va+mixer')}
        assert len(values['e3va+mixer']) >= 2 and min(values['e3va+mixer']) > max(values['frozen'])


def test_sentences_on_the_small_sets():
    """What the README says of means and memory."""
    from summarize import group_runs, peak_memory, values_of

    groups = group_runs(json.loads((ROOT / 'results/small_sets.json').read_text()))
    means = {
        name: {method: sum(values_of(name, runs)) / len(runs) for method, runs in methods.items()}
        for name, methods in groups.items()
    }
    assert {len(runs) for methods in groups.values() for runs in methods.values()} == {3}
    text = ' '.join((ROOT / 'README.md').read_text().split())

    def leads(method, other):
        return [f'{means[name][method] - means[name][other]:.1f}' for name in groups]

    def memory(method, other):
        return [f'{peak_memory(of[method]) / peak_memory(of[other]):.2f}' for of in groups.values()]

    assert 'by {} points on CamVid, {} on BCCD and {} on nuclei'.format(*leads('e3va', 'frozen')) in text
    ratios = memory('e3va', 'frozen')
    assert f'for {min(ratios)} to {max(ratios)} of its memory' in text
    assert {max(('mona', 'lora', 'adapter'), key=of.get) for of in means.values()} == {'mona'}
    assert 'Mona on each, ahead of E³VA by {}, {} and {} points'.format(*leads('mona', 'e3va')) in text
    ratios = [float(ratio) for ratio in memory('mona', 'e3va')]
    assert f'for {min(ratios):.1f} to {max(ratios):.1f} times its memory' in text
    better = [max(pair) for pair in zip(leads('e3va+mixer', 'e3va'), leads('e3va+mixer48x2', 'e3va'))]
    assert 'takes {}, {} and {} points of that'.format(*better) in text
    behind = [min(pair) for pair in zip(leads('mona', 'e3va+mixer'), leads('mona', 'e3va+mixer48x2'))]
    methods = ' '.join((ROOT / 'docs/methods.md').read_text().split())
    assert 'better mixer on each set, by {}, {} and {} points'.format(*behind) in methods
    assert set(memory('e3va+mixer', 'e3va') + memory('e3va+mixer48x2', 'e3va')) == {'1.00'}
    assert all(means['camvid']['e3va+mixer48x2'] > means['camvid'][method] for method in ('lora', 'adapter'))


def test_options_cost_no_accuracy():
    """The guard of the fast options, which chose the default of ``frozen_dtype``."""
    from summarize import group_runs, values_of

    content = json.loads((ROOT / 'results/guard.json').read_text())
    for dataset, methods in group_runs(content).items():
        means = {name: sum(values_of(dataset, runs)) / len(runs) for name, runs in methods.items()}
        assert {len(runs) for runs in methods.values()} == {3} and len(means) == 4
        assert all(abs(mean - means['e3va']) < 0.3 for mean in means.values()), (dataset, means)


def test_sentences_on_other_backbones():
    from summarize import group_runs, values_of

    text = ' '.join((ROOT / 'docs/backbones.md').read_text().split())
    leads, pairs = {}, 0
    for name, methods in group_runs(json.loads((ROOT / 'results/backbones.json').read_text())).items():
        by_seed = {m: {run['seed']: values_of(name, [run])[0] for run in methods[m]} for m in ('frozen', 'e3va')}
        differences = [by_seed['e3va'][seed] - by_seed['frozen'][seed] for seed in (0, 1, 2)]
        pairs += sum(difference > 0 for difference in differences)
        leads[name] = round(sum(differences) / 3, 1)
    assert leads == {
        'camvid, vit-tiny': 1.6,
        'bccd, vit-tiny': 2.1,
        'camvid, efficientnet-lite0': 0.4,
        'bccd, efficientnet-lite0': 1.3,
    }
    assert 'ViT-Ti by 1.6 points on CamVid and 2.1 on BCCD, EfficientNet-lite0 by 0.4 and 1.3' in text
    assert pairs == 10 and 'in 10 of 12 pairs' in text


def performance(name: str) -> tuple[str, list[dict]]:
    """The text of docs/performance.md, and the rows of a benchmark."""
    from summarize_benchmark import load_rows

    return ' '.join((ROOT / 'docs/performance.md').read_text().split()), load_rows(ROOT / f'results/{name}.json')


def test_averages_over_the_tasks():
    from update_docs import OVERVIEW_MODELS

    text, rows = performance('benchmark_gpu')
    plain = {(row['model'], row['method']): row for row in rows if (row['batch_size'], row['precision']) == (8, 'fp32')}

    def saved(method, key):
        shares = [1 - plain[model, method][key] / plain[model, 'full'][key] for model in OVERVIEW_MODELS]
        return f'{100 * sum(shares) / len(shares):.1f}'

    methods = ('e3va+bf16+taps-float8', 'e3va+bf16+taps-float8+sampled', 'frozen', 'full+checkpointed')
    memory = [saved(method, 'peak_memory_mib') for method in methods]
    assert (
        '{} % less with `bf16+taps-float8`, {} with `sampled`, {} with a frozen backbone, {} with'.format(*memory)
        in text
    )
    time = [saved(m, key) for key in ('step_seconds', 'kernel_seconds') for m in ('e3va+bf16', 'frozen')]
    assert '{} % less than full (frozen {} %)'.format(*time[:2]) in text
    assert '{} % less (frozen {} %)'.format(*time[2:]) in text


def test_memory_caps():
    text, rows = performance('benchmark_gpu')
    capped = {
        (row['memory_cap'], row['precision']): row
        for row in rows
        if 'taps-float8' in row['method'] and row['memory_cap']
    }
    for cap in (3, 4.5):
        peak = capped[cap, 'amp-fp16']['peak_memory_mib'] / 1024
        assert peak < cap and f'({peak:.2f} GiB' in text and not capped[cap, 'fp32']['batch_size']


def test_ratios_of_dinov2():
    text, rows = performance('benchmark_dinov2')
    ratios = {'peak_memory_mib': [], 'step_seconds': []}
    vits = {(row['model'], row['image_size'][0], row['method']): row for row in rows}
    for model, size, method in vits:
        if method == 'e3va+bf16':
            for key, values in ratios.items():
                values.append(f'{vits[model, size, method][key] / vits[model, size, "frozen"][key]:.2f}')
    assert (
        "takes {} and {} of frozen's memory for DINOv2-L at 512² and 896², and {} and {} for".format(
            *ratios['peak_memory_mib']
        )
        in text
    )
    assert 'of its time {}, {}, {} and {}.'.format(*ratios['step_seconds']) in text


def test_what_mixers_cost():
    text, rows = performance('benchmark_cpu_mixer')
    by_method = {row['method']: row for row in rows}
    plain, others = by_method['e3va'], [row for method, row in by_method.items() if method.startswith('e3va+')]
    assert len(others) == 4
    for key, sentence in (('peak_memory_mib', "{} to {} of E³VA's memory"), ('step_seconds', '{} to {} of its time')):
        ratios = sorted(f'{row[key] / plain[key]:.2f}' for row in others)
        assert sentence.format(ratios[0], ratios[-1]) in text


@pytest.mark.parametrize(
    'name', ['small_sets.json', 'guard.json', 'rates.json', 'backbones.json', 'shapes_methods_cpu.json']
)
def test_every_result_says_where_it_comes_from(name):
    content = json.loads((ROOT / 'results' / name).read_text())
    for run in content['runs'].values():
        assert {'device', 'torch', 'commit', 'command', 'seed', 'train_args'} <= set(run)
        assert (ROOT / run['config']).is_file()


@pytest.mark.parametrize('name', ['segmentation.png', 'detection.png', 'bars.png'])
def test_pictures_in_the_readme_exist(name):
    assert f'docs/images/{name}' in (ROOT / 'README.md').read_text()
    assert (ROOT / 'docs/images' / name).stat().st_size > 1000
