"""Which trainings a grid consists of, and what is made of their results."""

import argparse
import json
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.optim import build_optim_wrapper
from mmengine.registry import DATASETS, MODELS, init_default_scope

from benchmarks import grid, held_out, methods, training
from benchmarks.training import ROOT
from e3va_mm.methods import METHODS

from .conftest import result


def config_of(method, dataset='shapes-seg'):
    """The config as ``tools/train.py`` gets it for a method."""
    config = Config.fromfile(ROOT / grid.DATASETS[dataset].format(methods.config_prefix(method) + 'swin-nano'))
    options = (option.split('=', 1) for option in methods.cfg_options(method))
    config.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in options})
    return config


def merged(method):
    return config_of(method).model.backbone


def test_every_method_has_a_name():
    wrapped = {changes['method.type'] for changes in methods.METHODS.values() if 'method.type' in changes}
    assert wrapped == set(METHODS) - {'Full', 'PEFT'}


@pytest.mark.parametrize('dataset', [name for name in grid.DATASETS if 'taps' not in name])
def test_every_data_set_has_its_configs(dataset):
    has_own = dataset in ('camvid', 'bccd', 'nuclei', 'shapes-seg', 'shapes-det')
    is_small = 'shapes' in dataset or 'demo' in dataset
    backbones = grid.BACKBONES[:1] if is_small else grid.BACKBONES if has_own else grid.BACKBONES[1:]
    for backbone in backbones:
        for prefix in ('', 'frozen-', 'e3va-') if has_own else ('',):
            assert (ROOT / grid.DATASETS[dataset].format(prefix + backbone)).is_file()


@pytest.mark.parametrize('dataset', [name for name in grid.DATASETS if 'taps' in name])
def test_taps_that_are_compared_are_those_of_the_backbone(dataset):
    """Grids train the config as it is; adapters read as much, from the start exactly the frozen backbone."""
    (run,) = grid.plan(grid_args(datasets=[dataset], backbones=['efficientnet-lite0'], methods=['e3va'], seeds=[0]))
    assert not run.train_args
    backbone = Config.fromfile(ROOT / run.config).model.backbone
    backbone.backbone.checkpoint = None
    torch.manual_seed(0)
    model, images = MODELS.build(backbone).eval(), torch.randn(1, 3, 64, 64)
    assert all(torch.equal(*maps) for maps in zip(model(images), model.backbone(images)))
    taps = [module.core.shape[0] for module in model.highway if hasattr(module, 'core')]
    assert taps == ([2, 2, 3, 1] if 'all' in dataset else [1, 1, 2])


def test_stock_configs_are_tuned_by_a_flag():
    arguments = dict(datasets=['bccd-faster-rcnn'], backbones=['vit-tiny'], methods=['full', 'e3va+rank4', 'mona'])
    runs = grid.plan(grid_args(**arguments))
    assert {run.config for run in runs} == {'configs/bccd/faster-rcnn_vit-tiny_fpn_1xb8-400_bccd.py'}
    assert [run.train_args[-2:] for run in runs[:3]] == [(), ('--tune', 'e3va-paper'), ('--tune', 'mona')]
    assert 'model.backbone.adapter.rank=4' in runs[1].cfg_options
    assert len({run.name for run in runs}) == len(runs)


def test_a_backbone_without_a_config():
    with pytest.raises(SystemExit, match='no config for this data set and backbone: configs/shapes/vit-tiny'):
        grid.plan(grid_args(backbones=['vit-tiny']))


def test_a_method_changes_the_config_it_starts_from():
    assert merged('full').type == 'SwinTransformer'
    assert merged('full+checkpointed').with_cp
    assert merged('frozen').method == dict(type='Frozen')
    assert merged('mona').method == dict(type='Mona')
    assert merged('e3va').frozen_dtype is None and merged('e3va+bf16').frozen_dtype == 'bfloat16'
    variant = merged('e3va+taps-float8+sampled+rank4+mixer96')
    assert (variant.type, variant.saved_dtype, variant.saved_fraction) == ('E3VABackbone', 'float8_e4m3fn', 0.125)
    assert variant.adapter.rank == 4 and variant.mixer == dict(width=96)
    assert merged('e3va+mixer+graph2').graph_stages == 2
    init_default_scope('mmseg')
    MODELS.build(variant)


def test_rates_of_parts_of_the_backbone():
    options = methods.cfg_options('e3va+mixer+rate3')
    keys = 'optim_wrapper.paramwise_cfg.custom_keys'
    assert options[-2:] == [f'{keys}.highway.lr_mult=3', f'{keys}.mixers.lr_mult=3']
    config = config_of('e3va+mixer+rate3')
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    groups = build_optim_wrapper(model, config.optim_wrapper).param_groups
    rates = {
        id(parameter): group['lr'] / config.optim_wrapper.optimizer.lr
        for group in groups
        for parameter in group['params']
    }
    names = ('backbone.highway.3.down_in', 'backbone.mixers.0.0.up.weight', 'backbone.backbone.norm3.weight')
    assert [round(rates[id(model.get_parameter(name))], 6) for name in names] == [3, 3, 1]


def test_rate_of_the_mixers_alone():
    options = methods.cfg_options('e3va+mixer96+mixrate05')
    assert options[-1] == 'optim_wrapper.paramwise_cfg.custom_keys.mixers.lr_mult=0.5' and 'highway' not in str(options)
    assert methods.without_rates('e3va+mixer96+mixrate05') == 'e3va+mixer96'


@pytest.mark.parametrize('method', ['e4va', 'e3va+tap-float8', 'full+', 'lora+rate3', 'e3va+rank', 'e3va+mixer96x2'])
def test_unknown_method(method):
    with pytest.raises(ValueError, match='known are .*options'):
        methods.backbone_of(method)


@pytest.fixture()
def data_copy(shapes, tmp_path):
    """The generated set in a folder that may be written to, also in VOC's layout: lists and empty annotations."""
    copy = shutil.copytree(shapes, tmp_path / 'data')
    names = sorted(path.stem for path in (copy / 'images/train').iterdir())
    (copy / 'names.txt').write_text('\n'.join(names))
    for name in names:
        target = copy / f'VOC2007/Annotations/{name}.xml'
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text('<annotation><size><width>96</width><height>96</height></size></annotation>')
    return copy


@pytest.mark.parametrize(('dataset', 'fold'), [('shapes-seg', 4), ('shapes-det', 0), ('bccd', 4), ('bccd', 1)])
def test_held_out_images_are_not_trained_on(dataset, fold, data_copy):
    config = Config.fromfile(ROOT / grid.DATASETS[dataset].format('e3va-swin-nano'))
    for loader in (config.train_dataloader, config.val_dataloader):
        loader.dataset.data_root = f'{data_copy}/'
    if dataset == 'bccd':
        config.train_dataloader.dataset.ann_file = 'names.txt'
        config.train_dataloader.dataset.filter_cfg = None
    config.dump(data_copy / 'config.py')
    config.merge_from_dict(dict(option.split('=', 1) for option in held_out.hold_out(data_copy / 'config.py', fold)))
    init_default_scope(config.default_scope)
    train, val = (
        {Path(info['img_path']).stem for info in map(part.get_data_info, range(len(part)))}
        for part in (DATASETS.build(config[loader].dataset) for loader in ('train_dataloader', 'val_dataloader'))
    )
    names = sorted(path.stem for path in (data_copy / 'images/train').iterdir())
    assert not train & val and train | val <= set(names)
    assert val == set(names[len(names) * fold // 5 : len(names) * (fold + 1) // 5])


def test_a_run_a_fold(monkeypatch):
    monkeypatch.setattr(grid, 'hold_out', lambda config, fold: [f'fold={fold}'])
    arguments = '--datasets bccd --methods mona e3va --seeds 0 --held-out --folds 0 3 --out x.json'
    monkeypatch.setattr('sys.argv', ['grid.py', *arguments.split()])
    (args,) = grid.parse_args()
    runs = grid.plan(args)
    assert [(run.fold, run.cfg_options[-1]) for run in runs] == [(0, 'fold=0')] * 2 + [(3, 'fold=3')] * 2
    assert len({run.name for run in runs}) == 4


def test_holding_out_what_is_not_there(tmp_path):
    (tmp_path / 'config.py').write_text(
        "train_dataloader = dict(dataset=dict(type='CocoDataset', data_root='nowhere'))"
    )
    with pytest.raises(FileNotFoundError, match="data_root='nowhere'"):
        held_out.hold_out(tmp_path / 'config.py')


def rates_file(path):
    values = {('frozen', 1e-3): [40, 42], ('frozen', 3e-3): [43, 37], ('e3va', 1e-3): [30], ('e3va', 3e-3): [31]}
    runs = [
        {**result(method, value), 'learning_rate': rate} for (method, rate), means in values.items() for value in means
    ]
    path.write_text(json.dumps({'runs': dict(enumerate(runs))}))
    return path


def test_rates_with_more_seeds_rank_first(tmp_path):
    content = json.loads(rates_file(tmp_path / 'rates.json').read_text())
    content['runs']['again'] = {**result('e3va', 29), 'learning_rate': 1e-3}
    ranked = held_out.ranked_rates(content)
    assert ranked == {('shapes-96x96', 'frozen'): [1e-3, 3e-3], ('shapes-96x96', 'e3va'): [1e-3, 3e-3]}


def grid_args(**overrides):
    options = dict(datasets=['shapes-seg'], backbones=['swin-nano'], methods=['frozen', 'e3va'], seeds=[0, 1])
    flags = dict(
        train_args=[], cfg_options=[], learning_rates=None, rates_from=None, candidates=1, held_out=False, schedule=1
    )
    return argparse.Namespace(**{**options, **flags, **overrides})


def test_grid_of_learning_rates():
    names = [run.name for run in grid.plan(grid_args(learning_rates=[1e-3, 3e-3], methods=['e3va+mixer']))]
    stem = 'e3va-swin-nano_upernet_1xb8-600_shapes-96x96_e3va+mixer'
    assert names == [f'{stem}_lr{rate}_seed{seed}' for seed in (0, 1) for rate in (0.001, 0.003)]


def test_grids_share_the_jobs_and_come_in_turn(tmp_path, monkeypatch):
    arguments = (
        '--seeds 0 1 --methods frozen --and --datasets shapes-seg --and --datasets shapes-det --learning-rates 1e-3'
    )
    monkeypatch.setattr(sys, 'argv', ['grid.py', '--out', str(tmp_path / 'out.json'), *arguments.split()])
    asked = []
    monkeypatch.setattr(grid, 'run_all', lambda runs, *args: asked.extend(runs))
    with pytest.raises(SystemExit, match='4 of 4'):
        grid.main()
    pairs = [(run.seed, Path(run.config).name.partition('_')[0], run.learning_rate) for run in asked]
    assert pairs == [(seed, *part) for part in [('frozen-swin-nano', None), ('retinanet', 1e-3)] for seed in (0, 1)]


def test_a_share_of_the_schedule():
    (run, *_) = grid.plan(grid_args(schedule=0.5))
    config = Config.fromfile(ROOT / run.config)
    config.merge_from_dict({key: int(value) for key, value in (option.split('=') for option in run.cfg_options)})
    assert config.train_cfg.max_iters == config.train_cfg.val_interval == config.param_scheduler[1].end == 300
    with pytest.raises(ValueError, match='30 iterations, but its warm-up alone takes 30'):
        grid.plan(grid_args(schedule=0.05))


def test_a_failing_run_does_not_stop_the_others(tmp_path, monkeypatch):
    def call_tool(tool, log, variables, home):
        if 'bad.py' in tool:
            raise RuntimeError('bad.py failed')
        (log.parent / 'run_report.json').write_text('{}')

    monkeypatch.setattr(training, 'call_tool', call_tool)
    done = []
    runs = [training.Run(config, 'e3va') for config in ('bad.py', 'good.py')]
    with pytest.raises(RuntimeError, match=r'bad\.py failed'):
        training.run_all(runs, tmp_path, done=lambda run, result: done.append(run.config))
    assert done == ['good.py']


def test_a_folder_of_other_settings_is_not_taken_for_the_run(tmp_path, monkeypatch):
    def call_tool(tool, log, variables, home):
        (log.parent / 'run_report.json').write_text('{}')

    monkeypatch.setattr(training, 'call_tool', call_tool)
    run = training.Run('a.py', 'e3va', cfg_options=('train_cfg.max_iters=300',))
    for _ in range(2):
        training.run_all([run], tmp_path)
    for name in ('result.json', 'settings.json'):  # a run that has ended, and one that was interrupted
        with pytest.raises(RuntimeError, match=r"cfg_options=\['train_cfg.max_iters=300'\], not \[\]: use another"):
            training.run_all([run._replace(cfg_options=())], tmp_path)
        (tmp_path / run.name / name).unlink()


@pytest.mark.parametrize(
    ('visible', 'count', 'expected'),
    [('', 2, ['0', '1', '0']), ('5,7', 2, ['5', '7', '5']), ('', 1, [None] * 3), ('', 0, [None] * 3)],
)
def test_jobs_are_spread_over_the_gpus(visible, count, expected, tmp_path, monkeypatch):
    given, together = [], threading.Barrier(3)

    def call_tool(tool, log, variables, home):
        given.append(variables.get('CUDA_VISIBLE_DEVICES'))
        together.wait(timeout=30)
        (log.parent / 'run_report.json').write_text('{}')

    monkeypatch.setattr(training, 'call_tool', call_tool)
    monkeypatch.setattr(training.torch.cuda, 'device_count', lambda: count)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    training.run_all([training.Run('a.py', 'e3va', seed) for seed in range(3)], tmp_path, jobs=3)
    assert sorted(given, key=str) == sorted(expected, key=str)


def test_runs_that_time_leaves_out_are_said(tmp_path, monkeypatch):
    argv = ['grid.py', '--datasets', 'shapes-seg', '--time-limit', '-1', '--work-dir', str(tmp_path)]
    monkeypatch.setattr(sys, 'argv', [*argv, '--out', str(tmp_path / 'out.json')])
    with pytest.raises(SystemExit, match='9 of 9 runs have not been started'):
        grid.main()


def test_best_rates_are_used(tmp_path):
    runs = grid.plan(grid_args(rates_from=rates_file(tmp_path / 'rates.json')))
    assert [(run.method, run.learning_rate) for run in runs] == [('frozen', 1e-3), ('e3va', 3e-3)] * 2
    variants = grid.plan(grid_args(rates_from=tmp_path / 'rates.json', methods=['e3va+bf16'], seeds=[0]))
    assert [run.learning_rate for run in variants] == [3e-3]
    candidates = grid.plan(grid_args(rates_from=tmp_path / 'rates.json', candidates=2, seeds=[2]))
    assert [run.learning_rate for run in candidates] == [1e-3, 3e-3, 3e-3, 1e-3]
    with pytest.raises(SystemExit, match='no rate for mona on shapes-96x96'):
        grid.plan(grid_args(rates_from=tmp_path / 'rates.json', methods=['mona']))
