"""What tables make of results."""

import json

import pytest

from benchmarks import accuracy, cost_tables, formats, pages, recipe_tables
from benchmarks.methods import label
from benchmarks.plots import draw_accuracy, draw_growth

from .conftest import result

CAMVID = 'configs/camvid/swin-nano_upernet_1xb16-600_camvid-352x480.py'


def rows_of(*runs, **named):
    """The rows of the table of runs, without its titles."""
    groups = accuracy.group_runs({'runs': {**dict(enumerate(runs)), **named}})
    return accuracy.format_runs(groups).splitlines()[2:]


def test_names_for_people():
    assert label('e3va+bf16') == 'E³VA, bf16'
    assert label('e3va+rank4+mixer96+rate10') == 'E³VA + mixers, rate × 10'
    assert label('e3va+mixer64+taps-bf16+mixrate03') == "E³VA, mixers of width 64, bf16 taps, mixers' rate × 0.3"


def test_trainings_and_their_plot(tmp_path):
    runs = [result('e3va', 40), result('e3va', 42), result('frozen', 38)]
    frozen, e3va = rows_of(*runs)
    assert frozen.startswith('| shapes-96x96 | frozen backbone | mIoU 38.0 | 1 | 7 |')
    assert e3va == '| shapes-96x96 | E³VA | mIoU 41.0 ± 1.4 | 2 | 7 | 100 MiB | 2 MiB |'
    draw_accuracy(accuracy.group_runs({'runs': dict(enumerate(runs))}), tmp_path / 'plot.png')
    assert (tmp_path / 'plot.png').stat().st_size > 5000


def test_a_row_a_learning_rate():
    runs = [{**result('e3va', 40), 'learning_rate': rate} for rate in (3e-3, 1e-3)]
    assert [row.split('|')[2].strip() for row in rows_of(*runs)] == ['E³VA, rate 0.001', 'E³VA, rate 0.003']
    with pytest.raises(ValueError, match='e3va on camvid has several learning rates'):
        accuracy.format_mean('camvid', runs)


def test_no_detections_count_as_zero():
    run = result('e3va', 40, 'configs/shapes/retinanet_e3va-swin-nano_fpn_1xb8-800_shapes.py')
    run['report']['metrics'] = {}
    assert '| bbox_mAP 0.0 | 1 |' in rows_of(run)[0]


def test_other_backbones_have_rows_of_their_own():
    names = ('swin-nano', 'vit-tiny', 'efficientnet-lite0')
    runs = (result('e3va', 40, CAMVID.replace('swin-nano', f'e3va-{name}')) for name in names)
    shown = [row.split('|')[1].strip() for row in rows_of(*runs)]
    assert shown == ['camvid', 'camvid, vit-tiny', 'camvid, efficientnet-lite0']


def test_leads_are_of_equal_seeds():
    own = [result('e3va', value, CAMVID, seed) for seed, value in ((0, 40), (1, 44))]
    others = [result('mona', value, CAMVID, seed) for seed, value in ((1, 41), (0, 38), (2, 99))]
    assert accuracy.lead('camvid', own, others) == pytest.approx((2.5, 0.5))


def test_a_detector_takes_the_rate_of_its_own():
    groups = {'camvid': {pages.LIGHT: ['a']}, 'bccd': {f'{pages.LIGHT}+rate10': ['b']}}
    assert [pages.runs_of(groups, data, pages.LIGHT) for data in ('camvid', 'bccd', 'nuclei')] == [['a'], ['b'], []]


def recipe_file(path, leads):
    """Of each method and learning rate on CamVid, two seeds that are ahead of 40 and 42 by a lead a backbone."""
    runs = {}
    for (method, rate), lead in leads.items():
        for backbone, own in zip(('swin-nano', 'vit-tiny'), (1e-2, 3e-3)):
            for seed, value in enumerate((40, 42)):
                run = result(method, value + lead, CAMVID.replace('swin-nano', backbone), seed)
                run.update(learning_rate=rate * own, date='2026-12-01', device='GPU')
                runs[f'{method}{rate}{backbone}{seed}'] = run
    path.write_text(json.dumps({'runs': runs}))
    return path


def test_rates_of_the_recipe_are_in_units_of_the_configs(tmp_path):
    leads = {('e3va', 1): 0, ('mona', 1): 3, ('mona', 0.33): -2, ('mona', 2.9): 5}
    values = recipe_tables.read_values(recipe_file(tmp_path / 'recipe.json', leads))
    assert values['mona', 1 / 3]['camvid', 'vit-tiny'] == {0: 38, 1: 40}
    assert recipe_tables.means(values['mona', 3])['camvid', 'swin-nano'] == 46
    assert recipe_tables.lead(values, 'mona', 'e3va') == (3, 0, 4)
    del values['mona', 3]['camvid', 'swin-nano'], values['mona', 1 / 3]['camvid', 'vit-tiny'][0]
    assert [recipe_tables.change(values, 'mona', factor) for factor in (1 / 3, 3)] == [(-5, 2), (2, 1)]
    assert recipe_tables.change(values, 'e3va', 3)[1] == 0


def test_changes_around_the_configs_rates(tmp_path, monkeypatch):
    monkeypatch.setattr(recipe_tables, 'SHOWN', ('full', 'e3va'))
    leads = {('full', 1): 2, ('full', 0.3): 0.5, ('full', 3): 2.25, ('e3va', 1): 0, ('e3va', 3): 1}
    _, _, *rows = recipe_tables.format_around(recipe_file(tmp_path / 'recipe.json', leads)).splitlines()
    assert rows == ['| full fine-tuning | -1.5 (2) | +0.2 (2) |', '| E³VA | – | +1.0 (2) |']


def test_the_recipes_table_has_methods_with_all_combinations(tmp_path, monkeypatch):
    path = recipe_file(tmp_path / 'recipe.json', {('full', 1): 2, ('e3va', 1): 0, ('mona', 1): 3, ('lora', 3): 3})
    assert len(recipe_tables.format_recipe(path).splitlines()) == 2
    monkeypatch.setattr(recipe_tables, 'COMBINATIONS', [('camvid', name) for name in ('swin-nano', 'vit-tiny')])
    titles, _, *rows = recipe_tables.format_recipe(path).splitlines()
    assert titles.startswith('| method | CamVid, Swin | CamVid, ViT | mean |')
    assert rows[0] == '| E³VA | 41.0 | 41.0 | 41.0 |  |'
    assert rows[1] == '| Mona | 44.0 | 44.0 | 44.0 | +3.0 ± 0.0 (4) |' and rows[2].startswith('| full fine-tuning |')


def cost_rows(tmp_path, **overrides):
    """Rows of a file with full, e3va (two runs) and, if ``packages``, each of a package's."""
    run = dict(step_seconds=1, step_seconds_quartiles=[1, 1], saved_in_backbone_mib=1, batch_size=1)
    case = dict(model='m', image_size=[8, 8], data='synthetic', precision='fp32', batch_size=1, device='cpu')
    memory = {'full': [100], 'e3va': [40, 60]}
    cases = {
        method: {**case, 'method': method, **overrides, 'runs': [{**run, 'peak_memory_mib': mib} for mib in mibs]}
        for method, mibs in memory.items()
    }
    path = tmp_path / 'results.json'
    path.write_text(json.dumps({'cases': cases}))
    return cost_tables.load_rows(path)


def test_costs_are_medians_and_ratios(tmp_path):
    tables = cost_tables.report(cost_rows(tmp_path))
    assert '**m, 8×8, batch 1, fp32** (cpu)' in tables and '| E³VA | 50 MiB | 0.50 |' in tables


def test_packages_are_compared(tmp_path):
    before, after = cost_rows(tmp_path, package='before'), cost_rows(tmp_path, package='after')
    for row in after:
        row['peak_memory_mib'] *= 1.02
    lines = cost_tables.format_packages([*before, *after]).splitlines()
    assert lines[0] == '|  |  | memory of before | step | memory of after | step of after |'
    assert lines[3] == '| m, 8×8, batch 1, fp32 | E³VA | 50 MiB | 1000 ms | 1.020 | 1.000 |'


def test_fits():
    run = dict(largest={'8': 0, '12': 5, '80': 32}, most_images=32)
    row = dict(model='retinanet swin-l', image_size=[800, 1344], data='synthetic', method='full', runs=[run])
    lines = cost_tables.report([row]).splitlines()
    assert lines[0] == '|  | largest batch | 8 GB | 12 GB | 80 GB |'
    assert lines[2] == '| RetinaNet Swin-L, 800 × 1344 | full fine-tuning | – | 5 | 32+ |'
    measured = dict(row, runs=[dict(run, cost=dict(peak_memory_mib=7000, step_seconds=0.2))])
    lines = cost_tables.report([row, measured]).splitlines()
    assert lines[0].endswith('| 80 GB | memory of the smallest | step |')
    assert [line.partition(' 32+ ')[2] for line in lines[2:]] == ['|  |  |', '| 6.8 GiB | 200 ms |']


def test_scaling(tmp_path):
    case = dict(model='upernet swin-l', image_size=[512, 512], data='synthetic', batch_size=4, gpus=2)
    case.update(device='cpu', date='2026-11-30')
    sharded = dict(peak_memory_mib=5000, step_seconds=0.1, step_seconds_quartiles=[0.098, 0.104])
    times = {'alone_seconds': 0.095, 'apart_seconds': 0.096}
    run = {**sharded, **times, **{f'{key}_quartiles': [value - 0.001, value] for key, value in times.items()}}
    runs = {'e3va+bf16': run, 'e3va+bf16+bn+sharded': sharded}
    path = tmp_path / 'several_gpus.json'
    path.write_text(json.dumps({'cases': {name: {**case, 'method': name, 'runs': [runs[name]]} for name in runs}}))
    text = pages.format_scaling(path)
    assert (
        '| UPerNet Swin-L, 512², batch 4 a GPU | E³VA, bf16 | 2 | 4.9 GiB '
        '| 95 ms (94–95) | 96 ms (95–96) | 100 ms (98–104) | 0.95 |' in text
    )
    assert '| E³VA, bf16, BN in heads, frozen blocks sharded | 2 | 4.9 GiB |  |  | 100 ms (98–104) |  |' in text


def test_growth(tmp_path):
    """By the size of images, and of backbones: the largest has been measured with others."""
    case = dict(data='synthetic', batch_size=2, method='e3va+bf16', device='cpu', date='2026-11-30')
    run = dict(peak_memory_mib=5000, step_seconds=0.1)
    fit = dict(largest={'8': 0}, most_images=16, taken_gib=0.5, cost=dict(run, batch_size=2))
    models = {
        'images': {'upernet swin-l': [1024, 1024], 'dinov2-l_upernet_8xb2-160k_ade20k-512x512': [512, 512]},
        'backbones': {'upernet swin-t': [512, 512], 'dinov3-s_upernet_8xb2-160k_ade20k-512x512': [512, 512]},
        'giants': {'dinov3-7b_upernet_8xb2-160k_ade20k-512x512': [512, 512], 'dinov2-g_upernet': [896, 896]},
    }
    paths = [tmp_path / f'{name}.json' for name in models]
    assert pages.growth_rows(*paths) == ([], [])
    for path, (name, sizes) in zip(paths, models.items()):
        runs = [fit if name == 'giants' else run]
        cases = {model: {**case, 'model': model, 'image_size': size, 'runs': runs} for model, size in sizes.items()}
        path.write_text(json.dumps({'cases': cases}))
    found = pages.growth_rows(*paths)
    assert [[(row['panel'], row['size'], row['step_seconds']) for row in rows] for rows in found] == [
        [('UPerNet Swin-L', 1024, 0.1), ('UPerNet DINOv2-L', 512, 0.1)],
        [(f'UPerNet {name}, 512²', size, 0.1) for name, size in (('Swin', 'T'), ('DINOv3', 'S'), ('DINOv3', '7B'))],
    ]
    for rows in found:
        draw_growth(rows, tmp_path / 'plot.png')
        assert (tmp_path / 'plot.png').stat().st_size > 5000


def test_gradients(tmp_path):
    sizes = {'full': (892.4, 743.9), 'e3va': (155.2, 6.94)}
    case = dict(image_size=[512, 512], data='synthetic', model='upernet swin-l', batch_size=2)
    cases = {
        method: {**case, 'method': method, 'runs': [dict(gradients_mib=whole, backbone_mib=part)]}
        for method, (whole, part) in sizes.items()
    }
    path = tmp_path / 'results.json'
    path.write_text(json.dumps({'cases': cases}))
    titles, _, *lines = cost_tables.report(cost_tables.load_rows(path)).splitlines()
    assert titles == '| MiB a step / of the backbone | UPerNet Swin-L, 512² |'
    assert lines == ['| full fine-tuning | 892 / 743.9 |', '| E³VA | 155 / 6.9 |']


def test_formats():
    assert [formats.memory(mib) for mib in (1.2, 4095, 10240)] == ['1 MiB', '4095 MiB', '10.0 GiB']
    assert formats.span([1.234, 1.0]) == '1.00–1.23' and formats.span(iter([1, 1.001])) == '1.00'
