"""The README's tables are what the committed scripts make of the committed results."""

import json
import statistics
import sys
import textwrap

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


class SmallSets:
    """Means and memory of the methods on the small sets, in the order CamVid, BCCD, nuclei."""

    def __init__(self):
        from summarize import group_runs, peak_memory, values_of

        groups = group_runs(json.loads((ROOT / 'results/small_sets.json').read_text()))
        assert {len(runs) for methods in groups.values() for runs in methods.values()} == {3}
        self.means = {
            name: {method: sum(values_of(name, runs)) / 3 for method, runs in methods.items()}
            for name, methods in groups.items()
        }
        self.peaks = [{method: peak_memory(runs) for method, runs in methods.items()} for methods in groups.values()]

    def leads(self, method, other):
        return [f'{of[method] - of[other]:.1f}' for of in self.means.values()]

    def picked(self):
        """Means and memory of each set, with the variant that is picked for it."""
        from update_docs import PICKED

        return list(zip(self.means.values(), self.peaks, (PICKED[0], PICKED[1], PICKED[1])))

    def memory(self, method, other):
        return [f'{peaks[method] / peaks[other]:.2f}' for peaks in self.peaks]


@pytest.fixture(scope='module')
def small_sets():
    return SmallSets()


def page(path: str) -> str:
    return ' '.join((ROOT / path).read_text().split())


def test_what_the_readme_says_of_the_small_sets(small_sets):
    text, leads, memory = page('README.md'), small_sets.leads, small_sets.memory
    assert 'by {} points on CamVid, {} on BCCD and {} on nuclei, for'.format(*leads('e3va', 'frozen')) in text
    ratios = memory('e3va', 'frozen')
    assert f'for {min(ratios)} to {max(ratios)} of its memory' in text
    for of in small_sets.means.values():
        assert max((m for m in of if m != 'full' and not m.startswith('e3va')), key=of.get) == 'mona'
    assert 'on each set, ahead of E³VA by {}, {} and {} points'.format(*leads('mona', 'e3va')) in text
    ratios = [float(ratio) for ratio in memory('mona', 'e3va')]
    assert f'for {min(ratios):.1f} to {max(ratios):.1f} times its memory' in text
    ratios = memory('partial', 'e3va')
    assert f'is level with it at {min(ratios)} to {max(ratios)} of' in text


def test_the_picked_variants(small_sets):
    camvid, bccd, nuclei = (of[method] - of['mona'] for of, _, method in small_sets.picked())
    readme, text = page('README.md'), page('docs/methods.md')
    assert f'stages, {-camvid:.1f} points behind Mona on CamVid' in readme
    assert f'rate, {-bccd:.1f} points behind Mona on BCCD and {nuclei:.1f} ahead on nuclei' in readme
    assert f'10 variants on CamVid): {-camvid:.1f} points behind Mona' in text
    assert f'{-bccd:.1f} points behind Mona on BCCD and {nuclei:.1f} ahead on nuclei' in text
    of, _, method = small_sets.picked()[2]
    assert f'where it is {of[method] - of["full"]:.1f} ahead of full' in text
    for of, peaks, method in small_sets.picked():
        assert method == max((m for m in of if m.startswith('e3va+')), key=of.get)
        assert f'{peaks[method] / peaks["e3va"]:.2f}' == '1.00'


def test_the_picked_variants_against_light_methods(small_sets):
    ratios, of_mona = [], []
    for of, peaks, method in small_sets.picked():
        of_mona.append(f'{peaks[method] / peaks["mona"]:.2f}')
        assert of[method] > max(of[light] for light in ('frozen', 'partial', 'dtl', 'lst'))
        ratios.append(f'{peaks[method] / peaks["partial"]:.2f}')
    text = page('docs/methods.md')
    assert f'for {min(ratios)} to {max(ratios)} of its memory. Accuracy-bound' in text
    assert f'on two of the three for {min(of_mona)} to {max(of_mona)} of its memory' in text


@pytest.mark.parametrize('number', [0, 1], ids=['segmentation', 'detection'])
def test_the_configs_of_the_picked_variants(number):
    from method_specs import cfg_options
    from mmengine.config import Config
    from update_docs import PICKED

    blocks = [block for block in (ROOT / 'docs/methods.md').read_text().split('```') if 'mixer=dict(width=96' in block]
    lines = [block for block in blocks if block.startswith('python')][number]
    options = [option.split('=') for option in cfg_options(PICKED[number]) if 'frozen_dtype' not in option]
    expected = Config()
    expected.merge_from_dict({key: int(value) for key, value in options})
    shown = Config.fromstring(textwrap.dedent(lines.removeprefix('python')), '.py').to_dict()
    if number == 0:
        # As many mixers on a Swin-B as every2 has on a Swin-nano.
        assert shown['model']['backbone']['mixer'].pop('every') == 6
        assert expected.model.backbone.mixer.pop('every') == 2
    assert shown == expected.to_dict()


def test_what_is_said_of_other_methods(small_sets):
    text, leads, memory = page('docs/methods.md'), small_sets.leads, small_sets.memory
    lorand, partial = ([lead.lstrip('-') for lead in leads(method, 'e3va')] for method in ('lorand', 'partial'))
    assert 'gains {}, {} and {} points by that, for {} to {} times the memory'.format(
        *lorand, min(memory('lorand', 'e3va')), max(memory('lorand', 'e3va'))
    ) in text  # fmt: skip
    assert '({} points ahead, {} behind, {} ahead)'.format(*partial) in text
    lst = leads('lst', 'e3va')[1], memory('lst', 'e3va')[1]
    assert 'LST is {} points ahead on BCCD for {} of the memory'.format(*lst) in text
    assert leads('mona', 'adaptformer')[0] == '0.1'
    for name, of in small_sets.means.items():
        assert of['dtl'] < of['e3va'] and (of['lst'] > of['e3va']) == (name == 'bccd')
        assert (of['adaptformer'] > of['e3va']) == (name == 'camvid')
    assert max(abs(float(lead)) for m in ('bitfit', 'normtuning') for lead in leads(m, 'e3va')) == 0.6


@pytest.mark.parametrize(
    ('name', 'without', 'having', 'sentence'),
    [
        ('bccd', 'mixer48x2', 'mixer48x2+rate3', '2.9 points over `mixer48x2`'),
        ('nuclei', 'mixer48x2', 'mixer48x2+rate3', '3e-4, and 1.1 on nuclei'),
        ('camvid', 'mixer48x2+rate3', 'mixer48x2', 'and costs 1.7 points'),
        ('bccd', 'mixer48x2+feedback+rate3', 'mixer48x2+rate3', 'takes 1.2 points on BCCD'),
        ('nuclei', 'mixer48x2+feedback+rate3', 'mixer48x2+rate3', 'on BCCD and 0.2 on nuclei'),
        ('camvid', 'mixer48+every2+feedback', 'mixer48+every2', '`mixer48+every2` loses 2.9 points'),
        ('bccd', 'mixer48+every2+rate3', 'mixer48x2+rate3', 'with `rate3` they are 1.2 and'),
        ('nuclei', 'mixer48+every2+rate3', 'mixer48x2+rate3', 'and 0.4 points behind `mixer48x2` there'),
        ('camvid', 'mixer48x2', 'mixer48+every2', 'gain 0.4 points over `mixer48x2` on CamVid'),
        ('camvid', 'mixer64+every2', 'rank4+mixer96+every2', 'gains 0.4 points over `mixer64+every2` on CamVid'),
        ('nuclei', 'mixer96+rate3', 'mixer96+rate10', 'a further 0.6 over `mixer96+rate3`'),
    ],
)
def test_what_options_gain(small_sets, name, without, having, sentence):
    gain = small_sets.means[name][f'e3va+{having}'] - small_sets.means[name][f'e3va+{without}']
    assert f'{gain:.1f}' in sentence and sentence in page('docs/methods.md')


def test_options_of_the_adapters(small_sets):
    for name, sentence in (('bccd', 'gain {}, {} and {} points over'), ('camvid', 'they lose {}, {} and {}.')):
        of = small_sets.means[name]
        gains = (f'{abs(of[f"e3va+{option}"] - of["e3va"]):.1f}' for option in ('rank16', 'pca', 'mixing3'))
        assert sentence.format(*gains) in page('docs/methods.md')


def test_held_out_choice_of_variants():
    """By the mean of three seeds; the detectors' by the mean over both sets."""
    from summarize import group_runs
    from update_docs import PICKED

    means, spreads = {}, {}
    for name, methods in group_runs(json.loads((ROOT / 'results/rates.json').read_text())).items():
        for method, runs in methods.items():
            for values in values_by_rate(name, runs):
                if len(values) == 3:
                    means.setdefault(name, {})[method] = statistics.mean(values)
                    spreads.setdefault(name, []).append(statistics.stdev(values))
    assert [len(of) for of in means.values()] == [10, 10, 10]
    assert max(means['camvid'], key=means['camvid'].get) == PICKED[0]
    both = {m: mean + means['nuclei'][m] for m, mean in means['bccd'].items()}
    assert max(both, key=both.get) == PICKED[1]
    assert max(means['bccd'], key=means['bccd'].get) == 'e3va+mixer48+every2+feedback+rate3'
    text = page('docs/methods.md')
    apart = max(means['bccd'].values()) - min(means['bccd'].values())
    assert f'by {min(spreads["bccd"]):.1f} to {max(spreads["bccd"]):.1f} points (standard deviation)' in text
    assert f"variants' means by {apart:.1f}" in text
    assert f'`rate03` is {means["camvid"]["e3va+mixer96"] - means["camvid"]["e3va+mixer96+rate03"]:.1f} behind' in text
    pairs = ('camvid', ''), ('nuclei', '+rate3'), ('bccd', '+rate3')
    losses = [means[name][f'e3va+mixer96{rate}'] - means[name][f'e3va+mixer96+kaiming{rate}'] for name, rate in pairs]
    assert min(losses[:2]) > 0.8 and abs(losses[2]) < 0.1


def values_by_rate(name, runs) -> list[list[float]]:
    from summarize import values_of

    rates = {run['learning_rate'] for run in runs}
    return [values_of(name, [run for run in runs if run['learning_rate'] == rate]) for rate in rates]


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

    text = page('docs/backbones.md')
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

    return page('docs/performance.md'), load_rows(ROOT / f'results/{name}.json')


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
    assert len(others) == 5
    for key, sentence in (('peak_memory_mib', "{} to {} of E³VA's memory"), ('step_seconds', '{} to {} of its time')):
        ratios = sorted(f'{row[key] / plain[key]:.2f}' for row in others)
        assert sentence.format(ratios[0], ratios[-1]) in text


def test_what_mixers_cost_on_a_gpu():
    text, rows = performance('benchmark_mixers')
    kernels, waits, apart, kernels_apart = [], {}, [], {}
    for row in rows:
        if row['method'] in ('e3va', 'e3va+bf16'):
            plain = row
            waits[row['model']] = f'{row["step_seconds"] / row["kernel_seconds"]:.1f}'
        elif row['method'] != 'mona':
            kernels.append(f'{row["kernel_seconds"] / plain["kernel_seconds"]:.2f}')
            assert f'{row["peak_memory_mib"] / plain["peak_memory_mib"]:.2f}' == '1.00'
        steps, times = (
            [of(run) for run in row['runs']]
            for of in (lambda run: run['step_seconds'], lambda run: run['most_time'][0]['seconds'])
        )
        apart.append(max(steps) / min(steps))
        kernels_apart.setdefault(row['model'].split('_')[0], []).append(max(times) / min(times))
    assert f"is {min(kernels)} to {max(kernels)} of E³VA's" in text
    upernet, camvid, bccd, nuclei = waits.values()
    assert bccd == nuclei and f'{upernet} times as long with Swin-L and {camvid} on CamVid, {bccd} times with' in text
    assert f'by up to {max(apart):.1f} times from process to process' in text
    assert round(max(kernels_apart.pop('mask-rcnn')), 1) == 1.1
    assert max(map(max, kernels_apart.values())) < 1.01


def test_time_of_the_optimizer():
    def optimizer(name, method):
        rows = [r for r in performance(name)[1] if r['model'].startswith('retinanet') and r['method'] == method]
        return f'{1000 * rows[0]["runs"][0]["phases"]["optimizer"]["seconds"]:.0f}'

    stock, merged = (
        [optimizer(name, method) for method in ('e3va', 'mona')]
        for name in ('benchmark_groups', 'benchmark_small_sets_before')
    )
    text = page('README.md')
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
