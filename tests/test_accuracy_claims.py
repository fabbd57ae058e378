"""What the pages say of accuracy is what the result files say."""

import statistics

import pytest
from conftest import ROOT, page, result_file
from held_out import ranked_rates
from summarize import group_runs, peak_memory, values_of
from update_docs import LIGHT, PICKED, SEQUENTIAL, lead, more_seeds, steps_of


def test_demo():
    content = result_file('demo')
    values = {(row['task'], row['method']): row['value'] for row in content['rows']}
    assert all(values[task, 'E3VA + mixer'] > values[task, 'frozen'] for task in ('segmentation', 'detection'))


def test_mixers_tell_the_demo_from_frozen():
    content = result_file('shapes_methods_cpu')
    for dataset, methods in group_runs(content).items():
        values = {name: values_of(dataset, methods[name]) for name in ('frozen', 'e3va+mixer')}
        assert len(values['e3va+mixer']) >= 2 and min(values['e3va+mixer']) > max(values['frozen'])


class SmallSets:
    """Means and memory of the methods on the small sets, in the order CamVid, BCCD, nuclei."""

    def __init__(self):
        groups = group_runs(result_file('small_sets'))
        assert {len(runs) for methods in groups.values() for runs in methods.values()} == {3}
        self.means = {
            name: {method: sum(values_of(name, runs)) / 3 for method, runs in methods.items()}
            for name, methods in groups.items()
        }
        self.peaks = [{method: peak_memory(runs) for method, runs in methods.items()} for methods in groups.values()]

    def leads(self, method, other):
        return [f'{of[method] - of[other]:.1f}' for of in self.means.values()]

    def picked(self, variants=PICKED):
        """Means and memory of each set, with the variant that is picked for it."""
        return list(zip(self.means.values(), self.peaks, (variants[0], variants[1], variants[1])))

    def behind_mona(self, variants=PICKED):
        return [of['mona'] - of[method] for of, _, method in self.picked(variants)]

    def memory(self, method, other):
        return [f'{peaks[method] / peaks[other]:.2f}' for peaks in self.peaks]


@pytest.fixture(scope='module')
def small_sets():
    return SmallSets()


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
    assert 'is {}, {} and {} points further on at {} to {} of'.format(
        *leads('partial', 'e3va'), min(ratios), max(ratios)
    ) in text  # fmt: skip


def test_the_picked_variants(small_sets):
    camvid, bccd, nuclei = small_sets.behind_mona()
    readme, text = page('README.md'), page('docs/methods.md')
    assert f'is {camvid:.1f} points behind Mona on CamVid, {bccd:.1f} on BCCD and {nuclei:.1f} on nuclei' in readme
    assert f'13 variants on CamVid): {camvid:.1f} points behind Mona' in text
    assert f'18 variants): {bccd:.1f} points behind Mona on BCCD and {nuclei:.1f} on nuclei' in text
    of, _, method = small_sets.picked()[2]
    assert f'where it is {of[method] - of["full"]:.1f} ahead of full' in text
    ratios = sorted(f'{peaks[method] / peaks["e3va"]:.2f}' for _, peaks, method in small_sets.picked())
    assert f"for {ratios[0]} to {ratios[-1]} of E³VA's memory" in readme


def test_variants_without_a_block_in_the_graph(small_sets):
    text, readme, means = page('docs/methods.md'), page('README.md'), small_sets.means
    camvid, bccd, nuclei = small_sets.behind_mona(LIGHT)
    assert f'is {camvid:.1f} points behind Mona on CamVid, {bccd:.1f} behind on BCCD and {-nuclei:.1f} ahead' in readme
    assert f'near Mona: {camvid:.1f} points behind on CamVid, and with' in text
    assert f'with `rate10` {bccd:.1f} behind on BCCD and {-nuclei:.1f} ahead on nuclei' in text
    to_mona = {name: {m: of[m] - of['mona'] for m in of} for name, of in means.items()}
    assert f'for segmentation, {-to_mona["camvid"]["e3va+rank4+mixer96+every2"]:.1f} points behind Mona' in text
    bccd, nuclei = (to_mona[name]['e3va+rank4+mixer96x2+rate10'] for name in ('bccd', 'nuclei'))
    assert f'for detectors, {-bccd:.1f} points behind on BCCD and {nuclei:.1f} ahead on nuclei' in text
    for of in means.values():
        assert max(SEQUENTIAL, key=of.get) == 'mona'
    assert f'and {-to_mona["camvid"][PICKED[0]]:.2f} points are missing' in text
    assert f'which is {-to_mona["camvid"]["e3va+rank4+mixer192"]:.1f} points behind' in text


@pytest.fixture(scope='module')
def seeds():
    """The runs of the methods with more seeds than three, by data set and method."""
    return group_runs(more_seeds(result_file('small_sets'), result_file('more_seeds')))


def lead_over(seeds, name, method, other):
    return '{:.1f} ± {:.1f}'.format(*lead(name, seeds[name][method], seeds[name][other]))


def test_more_seeds(seeds):
    assert {len(runs) for methods in seeds.values() for runs in methods.values()} == {9}
    camvid, bccd = (lead_over(seeds, name, 'mona', method) for name, method in zip(('camvid', 'bccd'), PICKED))
    nuclei = lead_over(seeds, 'nuclei', PICKED[1], 'mona')
    text = page('docs/methods.md')
    assert f'full fine-tuning is {lead_over(seeds, "camvid", "full", "mona")} ahead of Mona on CamVid' in text
    assert f'the pick is {camvid} behind on CamVid and {nuclei} ahead on nuclei, and {bccd} behind on BCCD' in text
    assert f'pick is {lead_over(seeds, "nuclei", PICKED[1], "full")} ahead of full fine-tuning' in text
    ((name, folds),) = group_runs(result_file('folds')).items()
    on_folds = '{:.1f} ± {:.1f}'.format(*lead(name, folds['mona'], folds[PICKED[1]]))
    assert f'level with Mona ({on_folds} behind' in text
    claim = (
        f'level on CamVid ({camvid} behind), {bccd} behind on BCCD ({on_folds} on five folds of its training images)'
    )
    assert f'{claim}, and {nuclei} ahead on nuclei' in page('README.md')


def test_nine_seeds_of_bccd(seeds):
    text, picked = page('docs/methods.md'), PICKED[1]
    mona, full = (lead_over(seeds, 'bccd', method, picked) for method in ('mona', 'full'))
    assert f'Mona and full fine-tuning are {mona} and {full} points ahead of the pick' in text
    values = {method: values_of('bccd', runs) for method, runs in seeds['bccd'].items()}
    assert abs(statistics.mean(values[picked]) - statistics.mean(values['adapter'])) < 0.2
    assert f'{lead_over(seeds, "bccd", picked, LIGHT[1])} ahead of `rank4+mixer96+rate10`' in text
    assert f'and {lead_over(seeds, "bccd", picked, "e3va")} ahead of E³VA' in text
    spreads = [statistics.stdev(of) for of in values.values()]
    assert f'differ by {min(spreads):.1f} to {max(spreads):.1f} points (standard deviation)' in text


def test_folds():
    ((name, methods),) = group_runs(result_file('folds')).items()
    means, failed = {}, set()
    for method, runs in methods.items():
        for rate in {run['learning_rate'] for run in runs}:
            own = [run for run in runs if run['learning_rate'] == rate]
            assert sorted(run['fold'] for run in own) == sorted(list(range(5)) * (len(own) // 5))
            values = values_of(name, own)
            means[method, rate] = statistics.mean(values)
            failed.update({(method, rate)} if min(values) < 1 else ())
    variants = [key for key in means if key[0] != 'mona']
    assert len(variants) == 16 and len(methods['mona']) == len(methods[PICKED[1]]) == 15
    assert max(variants, key=means.get) == (PICKED[1], 1e-3) and means[PICKED[1], 1e-3] > means[LIGHT[1], 1e-3] + 0.4
    assert max(means, key=means.get)[0] == 'mona'
    wide = 'e3va+rank4+mixer96+'
    assert failed == {(f'{wide}feedback+rate10', 1e-3), (f'{wide}graph2+rate10', 1e-3), (f'{wide}graph1+rate3', 3e-3)}


def test_the_picked_variants_against_light_methods(small_sets):
    ratios, of_mona = [], []
    for of, peaks, method in small_sets.picked():
        of_mona.append(f'{peaks[method] / peaks["mona"]:.2f}')
        assert of[method] > max(of[light] for light in ('frozen', 'partial', 'dtl', 'lst'))
        ratios.append(f'{peaks[method] / peaks["partial"]:.2f}')
    text = page('docs/methods.md')
    assert f'for {min(ratios)} to {max(ratios)} of its memory. Accuracy-bound' in text
    behind = small_sets.behind_mona()
    memory = f'for {min(of_mona)} to {max(of_mona)} of its memory'
    assert f'is {min(behind):.1f} to {max(behind):.1f} points behind it {memory}' in text


def test_what_is_said_of_other_methods(small_sets):
    text, leads, memory = page('docs/methods.md'), small_sets.leads, small_sets.memory
    lorand, partial = ([lead.lstrip('-') for lead in leads(method, 'e3va')] for method in ('lorand', 'partial'))
    assert 'gains {}, {} and {} points by that, for {} to {} times the memory'.format(
        *lorand, min(memory('lorand', 'e3va')), max(memory('lorand', 'e3va'))
    ) in text  # fmt: skip
    assert 'is {}, {} and {} points ahead of E³VA; LST'.format(*partial) in text
    lst = leads('lst', 'e3va')[1], memory('lst', 'e3va')[1]
    assert 'LST is {} points ahead on BCCD for {} of the memory'.format(*lst) in text
    assert leads('mona', 'adaptformer')[0] == '0.1'
    for name, of in small_sets.means.items():
        assert of['dtl'] < of['e3va'] and (of['lst'] > of['e3va']) == (name == 'bccd')
        assert (of['adaptformer'] > of['e3va']) == (name == 'camvid')
    camvid, bccd, nuclei = zip(*(map(float, leads(method, 'e3va')) for method in ('bitfit', 'normtuning')))
    assert max(map(abs, camvid + nuclei)) == 0.5 and 'within 0.5 points of E³VA on CamVid and nuclei' in text
    assert '{} and {} ahead on BCCD'.format(*bccd) in text


@pytest.mark.parametrize(
    ('name', 'without', 'having', 'sentence'),
    [
        ('bccd', 'mixer48x2', 'mixer48x2+rate3', '2.9 points over `mixer48x2`'),
        ('nuclei', 'mixer48x2', 'mixer48x2+rate3', '3e-4, and 1.1 on nuclei'),
        ('camvid', 'mixer48x2+rate3', 'mixer48x2', 'and costs 1.7 points'),
        ('bccd', 'mixer48x2+feedback+rate3', 'mixer48x2+rate3', 'takes 1.2 points on BCCD'),
        ('bccd', 'mixer48+every2+rate3', 'mixer48+every2+feedback+rate3', '`mixer48+every2` gains 0.4 by it on BCCD'),
        ('nuclei', 'mixer48x2+feedback+rate3', 'mixer48x2+rate3', 'on BCCD and 0.2 on nuclei'),
        ('camvid', 'mixer48+every2+feedback', 'mixer48+every2', '`mixer48+every2` loses 2.9 points'),
        ('bccd', 'mixer48+every2+rate3', 'mixer48x2+rate3', 'with `rate3` they are 1.2 and'),
        ('nuclei', 'mixer48+every2+rate3', 'mixer48x2+rate3', 'and 0.4 points behind `mixer48x2` there'),
        ('camvid', 'mixer48x2', 'mixer48+every2', 'gain 0.4 points over `mixer48x2` on CamVid'),
        ('camvid', 'mixer64+every2', 'rank4+mixer96+every2', 'gains 0.4 points over `mixer64+every2` on CamVid'),
        ('camvid', 'rank4+mixer192', 'rank4+mixer96', '`rank4+mixer192`, lose 0.4 over `rank4+mixer96` there'),
        ('nuclei', 'mixer96+rate3', 'mixer96+rate10', 'a further 0.6 over `mixer96+rate3`'),
    ],
)
def test_what_options_gain(small_sets, name, without, having, sentence):
    gain = small_sets.means[name][f'e3va+{having}'] - small_sets.means[name][f'e3va+{without}']
    assert f'{gain:.1f}' in sentence and sentence in page('docs/methods.md')


def test_options_of_the_adapters(small_sets):
    sentences = {
        'bccd': 'gain {}, {} and {} points over',
        'camvid': 'they lose {}, {} and {} on CamVid',
        'nuclei': 'and {}, {} and {} on nuclei',
    }
    for name, sentence in sentences.items():
        of = small_sets.means[name]
        gains = (f'{abs(of[f"e3va+{option}"] - of["e3va"]):.1f}' for option in ('rank16', 'pca', 'mixing3'))
        assert sentence.format(*gains) in page('docs/methods.md')


class HeldOut:
    """What held-out images say of methods with three seeds, each at its best rate, by data set."""

    def __init__(self):
        self.values, self.means = {}, {}
        for name, methods in group_runs(result_file('rates')).items():
            rates = {method: values_by_rate(name, runs).values() for method, runs in methods.items()}
            known = {method: [values for values in of if len(values) == 3] for method, of in rates.items()}
            self.values[name] = {method: max(of, key=statistics.mean) for method, of in known.items() if of}
            self.means[name] = {method: statistics.mean(values) for method, values in self.values[name].items()}
        self.variants = {name: [m for m in of if m.startswith('e3va+')] for name, of in self.means.items()}


@pytest.fixture(scope='module')
def held_out():
    return HeldOut()


def test_held_out_choice_of_variants(held_out):
    """The best mean of three seeds, the detectors' over both sets."""
    camvid, bccd, nuclei = held_out.means.values()
    assert [len(of) for of in held_out.variants.values()] == [13, 18, 18]
    segmentation = {m: camvid[m] for m in held_out.variants['camvid']}
    detectors = {m: bccd[m] + nuclei[m] for m in held_out.variants['bccd']}
    for scores, *choices in (
        (segmentation, PICKED[0], 'e3va+rank4+mixer96+every2'),
        (detectors, PICKED[1], 'e3va+rank4+mixer96x2+rate10'),
    ):
        assert max(scores, key=scores.get) == choices[0]
        assert max((m for m in scores if 'graph' not in m), key=scores.get) == choices[1]
    steps = {key: row['of_first'] for key, row in steps_of(ROOT / 'results/steps.json').items()}
    within = [m for m in segmentation if steps.get(('camvid', m), 2) <= 1.15]
    assert max(within, key=segmentation.get) == 'e3va+rank4+mixer192' and LIGHT[0] in within
    detector_steps = [steps[name, 'e3va+rank4+mixer96x2'] for name in ('bccd', 'nuclei')]
    text = page('docs/methods.md')
    assert f"step takes {steps['camvid', 'e3va+rank4+mixer96+every2']:.2f} of E³VA's" in text
    assert 'at {:.2f} and {:.2f}. One mixer a stage'.format(*detector_steps) in text


def test_what_held_out_bccd_decides(held_out):
    text, variants, means = page('docs/methods.md'), held_out.variants['bccd'], held_out.means['bccd']
    spreads = [statistics.stdev(held_out.values['bccd'][m]) for m in variants]
    apart = max(means[m] for m in variants) - min(means[m] for m in variants)
    assert f"by {min(spreads):.1f} to {max(spreads):.1f} points, the 18 variants' means by {apart:.1f}" in text


def test_held_out_rates_of_the_highway(held_out):
    text, means = page('docs/methods.md'), held_out.means
    assert f'`rate03` is {means["camvid"]["e3va+mixer96"] - means["camvid"]["e3va+mixer96+rate03"]:.1f} behind' in text
    detectors = [means['bccd'], means['nuclei']]
    without = (of[PICKED[1]] - of['e3va+rate10'] for of in detectors)
    assert 'is {:.1f} and {:.1f} points behind the picked variant'.format(*without) in text
    assert all(of['e3va+mixer96+rate30'] == min(of[m] for m in of if 'mixer' in m) for of in detectors)
    pairs = ('camvid', ''), ('nuclei', '+rate3'), ('bccd', '+rate3')
    losses = [means[name][f'e3va+mixer96{rate}'] - means[name][f'e3va+mixer96+kaiming{rate}'] for name, rate in pairs]
    assert min(losses[:2]) > 0.8 and abs(losses[2]) < 0.1


def test_rates_of_methods_on_bccd(held_out):
    """Of three seeds, but for variants."""
    content = result_file('rates')
    chosen = {m: ranked[0] for (name, m), ranked in ranked_rates(content).items() if name == 'bccd' and '+' not in m}
    assert chosen.keys() <= held_out.means['bccd'].keys() and len(chosen) == 13
    trained = group_runs(result_file('small_sets'))['bccd']
    assert chosen == {method: trained[method][0]['learning_rate'] for method in chosen}
    by_rate = values_by_rate('bccd', group_runs(content)['bccd']['e3va'])
    apart = statistics.mean(by_rate[3e-4]) - statistics.mean(by_rate[1e-3])
    assert f"E³VA's three seeds gave it 3e-4, by {apart:.1f} points" in page('docs/methods.md')


def values_by_rate(name, runs) -> dict[float, list[float]]:
    rates = {run['learning_rate'] for run in runs}
    return {rate: values_of(name, [run for run in runs if run['learning_rate'] == rate]) for rate in rates}


def test_options_cost_no_accuracy():
    """The guard of the fast options, which chose the default of ``frozen_dtype``."""
    content = result_file('guard')
    for dataset, methods in group_runs(content).items():
        means = {name: sum(values_of(dataset, runs)) / len(runs) for name, runs in methods.items()}
        assert {len(runs) for runs in methods.values()} == {3} and len(means) == 4
        assert all(abs(mean - means['e3va']) < 0.3 for mean in means.values()), (dataset, means)


def test_sentences_on_other_backbones():
    text = page('docs/backbones.md')
    leads, pairs = {}, 0
    for name, methods in group_runs(result_file('backbones')).items():
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
