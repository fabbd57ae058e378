"""Every config loads, and builds and runs with its backbone shrunk; the folders' tables and metafiles are true."""

import json
import re
import statistics
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT, timm_features
from mmengine.config import Config, DictAction
from mmengine.registry import DATASETS, MODELS, init_default_scope
from mmengine.registry import METRICS as METRIC_TYPES

CONFIGS = sorted(path for path in (ROOT / 'configs').glob('*/*.py') if path.parent.name != '_base_')
WIDTHS = [12, 24, 48, 96]
PYRAMID = 'SimpleFeaturePyramid'
TRAINED = ('bccd', 'camvid', 'nuclei', 'shapes')
# Stock configs, which `--tune` wraps.
OTHER_HEADS = ('segformer', 'faster-rcnn', 'mask2former')


def shrink(config: Config) -> Config:
    """Replaces the widths and depths of the backbone, and the input widths of what follows it."""
    backbone = config.model.backbone.get('backbone', config.model.backbone)
    if backbone.type == 'TIMMFeatures':
        tiny = timm_features(backbone.model_name)
        backbone.update(tiny, pretrained=False, checkpoint=None)
        widths = MODELS.build(backbone).embed_dims
    else:
        backbone.update(embed_dims=12, depths=[1, 1, 2, 1], num_heads=[1, 2, 4, 8], init_cfg=None)
        widths = [WIDTHS[index] for index in backbone.get('out_indices', range(4))]
    if 'neck' in config.model:
        config.model.neck.in_channels = widths
    if config.model.get('neck', {}).get('type') == PYRAMID:
        assert len(widths) == len(config.model.neck.get('scales', range(4)))
    elif 'decode_head' in config.model:
        config.model.decode_head.update(in_channels=widths, channels=16)
        if config.model.auxiliary_head:
            config.model.auxiliary_head.update(in_channels=widths[2], channels=16)
    elif 'panoptic_head' in config.model:
        config.model.panoptic_head.in_channels = widths
    return config


def check_schedule(path: Path, config: Config) -> None:
    """Batch size and iterations are those of the name."""
    batch_size, iterations = map(int, re.search(r'_1xb(\d+)-(\d+)_', path.stem).groups())
    assert (config.train_dataloader.batch_size, config.train_cfg.max_iters) == (batch_size, iterations)
    assert config.train_cfg.val_interval == config.param_scheduler[-1].end == iterations


@pytest.mark.parametrize('path', CONFIGS, ids=[path.stem for path in CONFIGS])
def test_config_builds_and_runs(path):
    config = shrink(Config.fromfile(path))
    if '_1xb' in path.stem:
        check_schedule(path, config)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model).eval()
    features = model.extract_feat(torch.randn(1, 3, 64, 64))
    assert all(feature.isfinite().all() for feature in features)
    assert [feature.shape[-1] for feature in features][:2] in ([16, 8], [8, 4])
    trainable = {name for name, parameter in model.backbone.named_parameters() if parameter.requires_grad}
    method = 'e3va' if 'e3va-' in path.stem else 'frozen' if 'frozen-' in path.stem else 'full'
    if method == 'e3va':
        assert any(name.startswith('highway') for name in trainable)
        parts = ('highway', 'backbone.norm') + ('mixers',) * ('graph1' in path.stem)
        assert all(name.startswith(parts) for name in trainable)
    else:
        assert bool(trainable) == (method == 'full')
    hooks = {'ParameterTableHook', 'ResourceReportHook'} | ({'DeviceMasksHook'} if 'mask-rcnn' in path.stem else set())
    assert {hook.type for hook in config.custom_hooks} == hooks


def test_every_benchmark_has_its_siblings():
    """Each data set with E³VA and full fine-tuning; those that are trained here with a frozen backbone, too."""
    without = ('graph1', *OTHER_HEADS)
    paths = [path for path in CONFIGS if not any(name in path.stem for name in without)]
    names = [str(path.relative_to(ROOT)) for path in paths]
    kinds = {prefix: {name.replace(prefix, '') for name in names if prefix in name} for prefix in ('e3va-', 'frozen-')}
    full = {name for name in names if 'e3va-' not in name and 'frozen-' not in name}
    assert kinds['e3va-'] == full and len(full) > 30
    assert kinds['frozen-'] == {name for name in full if name.split('/')[1] in TRAINED}


@pytest.mark.parametrize('name', ['camvid', 'bccd', 'nuclei', 'shapes'])
def test_an_e3va_config_becomes_a_frozen_one_on_the_command_line(name):
    for path in (path for path in CONFIGS if path.parent.name == name and 'e3va-swin-nano' in path.stem):
        config = Config.fromfile(path)
        config.merge_from_dict({'model.backbone.type': 'TunedBackbone', 'model.backbone.method.type': 'Frozen'})
        frozen = Config.fromfile(path.with_name(path.name.replace('e3va-', 'frozen-')))
        assert config.to_dict() == frozen.to_dict()


def test_bccd_is_evaluated_under_its_own_class_names(monkeypatch):
    from mmdet.evaluation.metrics import voc_metric

    tables = []
    monkeypatch.setattr(voc_metric, 'eval_map', lambda *_, dataset, **__: tables.append(dataset) or (0.0, []))
    config = Config.fromfile(ROOT / 'configs/bccd/retinanet_e3va-swin-nano_fpn_1xb8-400_bccd.py')
    init_default_scope('mmdet')
    metric = METRIC_TYPES.build(config.val_evaluator)
    metric.dataset_meta = DATASETS.build({**config.val_dataloader.dataset, 'lazy_init': True}).metainfo
    metric.compute_metrics([(None, None)])
    assert set(tables) == {('RBC', 'WBC', 'Platelets')}


METAFILES = sorted((ROOT / 'configs').glob('*/metafile.yml'))
METRICS = {'mIoU': ('mIoU', 1), 'box AP': ('pascal_voc/mAP', 100), 'mask AP': ('coco/segm_mAP', 100)}
# What differs between a config and how the reported runs were started, and is said beside the tables.
SAID = ('frozen_dtype', 'num_workers')


@lru_cache
def loaded(path: str) -> Config:
    return Config.fromfile(ROOT / path)


@lru_cache
def as_started(path: str, cfg_options: tuple[str, ...], learning_rate: float | None) -> dict:
    """The config of a run, with the options that it was started with."""
    config = loaded(path).copy()
    options = dict(option.split('=', 1) for option in cfg_options if not any(name in option for name in SAID))
    config.merge_from_dict({key: DictAction._parse_iterable(value) for key, value in options.items()})
    if learning_rate:
        config.optim_wrapper.optimizer.lr = learning_rate
    return config.to_dict()


def reported(name: str) -> list[dict]:
    folder = next(path for path in (ROOT / 'benchmarks/results', ROOT / 'results') if path.is_dir())
    return list(json.loads((folder / f'{name}.json').read_text())['runs'].values())


@lru_cache
def runs_of(path: str) -> list[dict]:
    """The reported runs of exactly this config, options and learning rate included."""
    folder, stem = path.split('/')[1], Path(path).stem
    name = 'shapes_methods_cpu' if folder == 'shapes' else 'small_sets' if 'swin-nano' in stem else 'backbones'
    name = 'heads' if stem.startswith(OTHER_HEADS) else name
    candidates = {path, path.replace('graph1-', '')}
    own = loaded(path).to_dict()
    runs = [run for run in reported(name) if run['config'] in candidates and '--tune' not in run['train_args']]
    started = [as_started(run['config'], tuple(run['cfg_options']), run.get('learning_rate')) for run in runs]
    return [run for run, config in zip(runs, started) if config == own]


@pytest.mark.parametrize('metafile', METAFILES, ids=[path.parent.name for path in METAFILES])
def test_a_metafile_lists_the_configs_of_its_folder(metafile):
    content = yaml.safe_load(metafile.read_text())
    collections = {collection['Name'] for collection in content['Collections']}
    assert all((ROOT / collection['README']).is_file() for collection in content['Collections'])
    configs = [str(path.relative_to(ROOT)) for path in CONFIGS if path.parent == metafile.parent]
    assert sorted(model['Config'] for model in content['Models']) == configs
    assert len({model['Name'] for model in content['Models']}) == len(configs)
    for model in content['Models']:
        assert model['In Collection'] in collections and Path(model['Config']).stem == model['Name']
        if '_1xb' in model['Name'] and 'Results' in model:
            batch_size, iterations = map(int, re.search(r'_1xb(\d+)-(\d+)_', model['Name']).groups())
            assert (model['Metadata']['Batch Size'], model['Metadata']['Iterations']) == (batch_size, iterations)


def test_every_folder_has_a_table_and_a_metafile():
    folders = {path.parent for path in CONFIGS}
    assert folders == {path.parent for path in METAFILES}
    assert all((folder / 'README.md').is_file() for folder in folders)


@pytest.mark.parametrize('metafile', METAFILES, ids=[path.parent.name for path in METAFILES])
def test_numbers_are_those_of_the_runs(metafile):
    """In metafile and table alike; a config without reported runs has none, and says so."""
    table = (metafile.parent / 'README.md').read_text()
    for model in yaml.safe_load(metafile.read_text())['Models']:
        (row,) = (line for line in table.splitlines() if f'({model["Name"]}.py)' in line)
        if 'Results' not in model:
            assert metafile.parent.name not in TRAINED or 'not trained' in row
            continue
        ((metric, value),) = model['Results'][0]['Metrics'].items()
        runs = runs_of(model['Config'])
        key, scale = METRICS[metric] if 'shapes' not in model['Name'] or metric == 'mIoU' else ('coco/bbox_mAP', 100)
        values = [scale * run['report']['metrics'][key] for run in runs]
        assert len(values) == model['Metadata']['Seeds'] == len({run['seed'] for run in runs})
        assert f'{statistics.mean(values):.1f}' == f'{value}'
        assert f'{metric} {value} ± {statistics.stdev(values):.1f}' in row
        if 'Training Memory (GB)' in model['Metadata']:
            peak_mib = statistics.median(run['report']['peak_memory_mib'] for run in runs)
            assert model['Metadata']['Training Memory (GB)'] == round(peak_mib / 1024, 2)
            assert f'{peak_mib:.0f} MiB' in row


def test_backbone_size_and_rank_from_the_command_line():
    config = Config.fromfile(next(path for path in CONFIGS if 'e3va-swin-b-p4' in path.stem))
    options = {
        'model.backbone.adapter.rank': 4,
        'model.backbone.backbone.embed_dims': 96,
        'model.backbone.backbone.depths': [2, 2, 6, 2],
        'model.backbone.backbone.num_heads': [3, 6, 12, 24],
        'model.neck.in_channels': [96, 192, 384, 768],
    }
    config.merge_from_dict(options)
    init_default_scope(config.default_scope)
    backbone = MODELS.build(config.model.backbone)
    assert backbone.highway[0].core.shape == (4, 2, 4, 4)
    assert [stage.down_in.shape[1] for stage in backbone.highway] == [96, 192, 384, 768]


def test_a_five_line_config(tmp_path):
    """The interface as DESIGN has it, on a stock config that this project does not have."""
    stock = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
    path = Path(tmp_path, 'mine.py')
    path.write_text(
        f"_base_ = '{stock}'\n"
        "custom_imports = dict(imports=['e3va_mm'], allow_failed_imports=False)\n"
        "model = dict(backbone=dict(_delete_=True, type='E3VABackbone', backbone={{_base_.model.backbone}},\n"
        '    adapter=dict(rank=8, branches=2, hidden_ratio=0.5)))\n'
    )
    config = shrink(Config.fromfile(path))
    init_default_scope('mmseg')
    backbone = MODELS.build(config.model).backbone
    assert [len(stage.down_in) for stage in backbone.highway] == [2, 2, 4, 2]
