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
    mixers = [{method: mean for method, mean in of.items() if method.startswith('e3va+')} for of in means.values()]
    best = [max(of, key=of.get) for of in mixers]
    assert best == ['e3va+mixer48+every2', 'e3va+mixer48x2+rate3', 'e3va+mixer48x2+feedback+rate3']
    behind = '{}, {} and {} points behind Mona'.format(
        *(f'{means[name]["mona"] - means[name][method]:.1f}' for name, method in zip(groups, best))
    )
    methods = ' '.join((ROOT / 'docs/methods.md').read_text().split())
    assert behind in text and behind in methods
    shares = {f'{peak_memory(of[m]) / peak_memory(of["e3va"]):.2f}' for of in groups.values() for m in of if '+' in m}
    assert shares == {'1.00', '1.01'}
    assert means['camvid']['frozen'] > means['camvid']['e3va+mixer48+every2+feedback']
    steps = (('bccd', 'mixer48x2', 'mixer48x2+rate3', '2.9 points over `mixer48x2`'),
             ('bccd', 'mixer48x2+feedback+rate3', 'mixer48x2+rate3', 'takes 1.2 points on BCCD'),
             ('camvid', 'mixer48+every2+feedback', 'mixer48+every2', '`mixer48+every2` loses 2.9 points'),
             ('camvid', 'mixer48x2', 'mixer48+every2', 'gain 0.4 points over `mixer48x2` on CamVid'))  # fmt: skip
    for name, without, having, sentence in steps:
        gain = means[name][f'e3va+{having}'] - means[name][f'e3va+{without}']
        assert f'{gain:.1f}' in sentence and sentence in methods


def test_held_out_choice_of_variants():
    """By the first seed, as the learning rates."""
    from summarize import group_runs, values_of

    chosen = {}
    for name, methods in group_runs(json.loads((ROOT / 'results/rates.json').read_text())).items():
        best = {
            method: max(value for run in runs if run['seed'] == 0 for value in values_of(name, [run]))
            for method, runs in methods.items()
        }
        chosen[name] = max((method for method in best if method.startswith('e3va')), key=best.get)
        if name == 'camvid':
            assert round(best['frozen'] - best['e3va+mixer48x2+feedback+rate3']) == 5
    assert chosen == {
        'camvid': 'e3va+mixer48x2',
        'bccd': 'e3va+mixer48x2+rate3',
        'nuclei': 'e3va+mixer48x2+rate3',
    }


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


def test_what_methods_cost_on_a_gpu():
    text, rows = performance('benchmark_methods')
    by_method = {row['method']: row for row in rows}
    mixers = [row for method, row in by_method.items() if method.startswith('e3va+bf16+')]

    def ratios(key, rows, reference):
        return sorted(f'{row[key] / reference[key]:.2f}' for row in rows)

    plain = by_method['e3va+bf16']
    memory, step = (ratios(key, mixers, plain) for key in ('peak_memory_mib', 'step_seconds'))
    assert f'{memory[0]} to {memory[-1]} of the memory and {step[0]} to {step[-1]} of the time of `bf16`' in text
    memory, step = (ratios(key, [by_method['mona']], plain)[0] for key in ('peak_memory_mib', 'step_seconds'))
    assert f'Mona takes {memory} of the memory and {step} of the time' in text

    small = {(row['model'].split('_')[0], row['method']): row for row in performance('benchmark_small_sets')[1]}

    def time(model, method):
        return f'{small[model, method]["step_seconds"] / small[model, "e3va"]["step_seconds"]:.2f}'

    def times_of_mixers(*models):
        return sorted(time(model, method) for model, method in small if model in models and '+' in method)

    detectors, camvid = times_of_mixers('retinanet', 'mask-rcnn'), times_of_mixers('swin-nano')
    assert f"{detectors[0]} to {detectors[-1]} of E³VA's time with detectors" in text
    assert f'{camvid[0]} to {camvid[-1]} on CamVid' in text
    assert 'LoRA and Adapter take {} and {} of'.format(time('retinanet', 'lora'), time('retinanet', 'adapter')) in text


def test_time_of_the_optimizer():
    def optimizer(name, method):
        rows = [r for r in performance(name)[1] if r['model'].startswith('retinanet') and r['method'] == method]
        return f'{1000 * rows[0]["runs"][0]["phases"]["optimizer"]["seconds"]:.0f}'

    stock, merged = (
        [optimizer(name, method) for method in ('e3va', 'mona')]
        for name in ('benchmark_groups', 'benchmark_small_sets')
    )
    text = ' '.join((ROOT / 'README.md').read_text().split())
    assert '{} ms for E³VA and {} for Mona, merged {} and {}'.format(*stock, *merged) in text


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
