"""Every config loads, and builds and runs with its backbone shrunk."""

import re
from pathlib import Path

import pytest
import torch
from conftest import ROOT, timm_features
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

CONFIGS = sorted(path for path in (ROOT / 'configs').glob('*/*.py') if path.parent.name != '_base_')
WIDTHS = [12, 24, 48, 96]
PYRAMID = 'SimpleFeaturePyramid'


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
        config.model.auxiliary_head.update(in_channels=widths[2], channels=16)
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
    assert {hook.type for hook in config.custom_hooks} == {'ParameterTableHook', 'ResourceReportHook'}


def test_every_benchmark_has_its_siblings():
    names = [str(path.relative_to(ROOT)) for path in CONFIGS if 'graph1' not in path.stem]
    kinds = {prefix: {name.replace(prefix, '') for name in names if prefix in name} for prefix in ('e3va-', 'frozen-')}
    full = {name for name in names if 'e3va-' not in name and 'frozen-' not in name}
    assert kinds['e3va-'] == kinds['frozen-'] == full and len(full) > 30


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
    assert [len(stage.blocks) for stage in MODELS.build(config.model).backbone.family.stages] == [1, 1, 2, 1]
