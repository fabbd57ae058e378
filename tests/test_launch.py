"""What the tools make of their arguments and configs, before anything runs."""

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, swin
from mmengine.config import Config

from e3va_mm.launch import enable_amp, load_config


def test_resume_finds_what_the_hook_saves_elsewhere(tmp_path):
    set_resume = runpy.run_path(str(ROOT / 'tools/train.py'))['set_resume']
    hook = dict(type='CheckpointHook', out_dir=str(tmp_path / 'out'))
    config = Config(dict(work_dir=str(tmp_path / 'run'), default_hooks=dict(checkpoint=hook), resume=True))
    set_resume(config, 'auto')
    assert not config.resume
    (tmp_path / 'out/run').mkdir(parents=True)
    torch.save({'state_dict': {}}, tmp_path / 'out/run/iter_4.pth')
    set_resume(config, 'auto')
    assert config.resume and config.load_from == str(tmp_path / 'out/run/iter_4.pth')


def test_bad_inputs(seg_config, tmp_path, error_of):
    expectations = {
        'model.backbone.adapter.rank=0': 'adapter.rank must be an integer of at least 1, got 0',
        'model.backbone.adapter.rnak=4': r"unknown option \['rnak'\]",
        'model.backbone.backbone.type=Swim': "backbone.type 'Swim' can not be built; similar are",
        'model.backbone.backbone.init_cfg.checkpoint=no.pth': "init_cfg.checkpoint='no.pth': there is no such",
        'train_dataloader.dataset.data_root=nowhere': "train_dataloader.dataset.data_root='nowhere' is no folder",
        'train_dataloader.batch_size=0': 'train_dataloader.batch_size must be an integer of at least 1, got 0',
        'default_scope=mmpose': "default_scope must be one of .* has 'mmpose'",
    }
    for option, message in expectations.items():
        error = error_of('tools/train.py', seg_config, '--work-dir', tmp_path, '--cfg-options', option)
        assert re.search(message, error), (option, error)
    assert 'no.py does not exist' in error_of('tools/train.py', tmp_path / 'no.py')
    if not torch.cuda.is_available():
        assert '--amp needs a CUDA device' in error_of('tools/train.py', seg_config, '--amp')


def test_no_input_is_overwritten(seg_config, shapes, tmp_path, error_of):
    images, masks = shapes / 'images/val', shapes / 'masks/val'
    weights = tmp_path / 'a.pth'
    weights.write_bytes(b'')
    (tmp_path / 'a.safetensors').symlink_to(weights)
    expectations = {
        ('infer', images, seg_config, weights, '--out-dir', images): images / '0000.png',
        ('test', seg_config, weights, '--out', masks): masks,
        ('test', seg_config, weights, '--show-dir', masks / 'pictures'): masks,
        ('merge', seg_config, weights, weights): weights,
        ('publish_adapter', weights, tmp_path / 'a.safetensors'): weights,
    }
    for (name, *arguments), source in expectations.items():
        error = error_of(f'tools/{name}.py', *arguments)
        assert re.search(rf'{arguments[-1]}.* would overwrite .*{source}', error), (name, error)
    assert weights.read_bytes() == b''


def test_merge_spares_the_weights_of_the_base(tmp_path, weights, error_of):
    backbone = dict(
        type='TunedBackbone',
        method=dict(type='LoRA'),
        backbone=swin(init_cfg=dict(type='Pretrained', checkpoint=weights)),
    )
    head = dict(type='FCNHead', in_channels=96, in_index=3, channels=4, num_classes=2)
    model = dict(type='EncoderDecoder', backbone=backbone, decode_head=head)
    Config(dict(default_scope='mmseg', model=model)).dump(tmp_path / 'config.py')
    error = error_of('tools/merge.py', tmp_path / 'config.py', 'iter_1.pth', weights)
    assert f'would overwrite the input {weights}' in error


def test_pictures_of_images_that_differ_by_suffix():
    targets_of = runpy.run_path(str(ROOT / 'tools/infer.py'))['targets_of']
    targets = targets_of([Path('a.jpg'), Path('a.png'), Path('b.jpg')], 'out')
    assert [str(target) for target in targets] == ['out/a.jpg.png', 'out/a.png.png', 'out/b.png']


def test_tta_and_out_with_wrapped_settings():
    tools = runpy.run_path(str(ROOT / 'tools/test.py'))
    leaf = dict(type='CocoDataset', pipeline=[dict(type='LoadImageFromFile'), dict(type='PackDetInputs')])
    both = dict(type='ConcatDataset', datasets=[leaf, dict(type='RepeatDataset', times=2, dataset=leaf)])
    config = Config(dict(default_scope='mmdet', model=dict(type='A'), test_dataloader=dict(dataset=both)))
    tools['augment_test_time'](config)
    one, other = config.test_dataloader.dataset.datasets
    assert one.pipeline[-1].type == other.dataset.pipeline[-1].type == 'TestTimeAug' and 'pipeline' not in other
    evaluators = [dict(type='mmengine.DumpResults', out_file_path='a.pkl'), dict(type='IoUMetric')]
    config = Config(dict(default_scope='mmseg', test_evaluator=evaluators))
    tools['write_masks'](config, 'out')
    assert 'output_dir' not in config.test_evaluator[0] and config.test_evaluator[1].output_dir == 'out'
    with pytest.raises(ValueError, match='--out needs an evaluator with output_dir'):
        tools['write_masks'](Config(dict(default_scope='mmseg', test_evaluator=evaluators[0])), 'out')


def test_tta_of_masks_is_refused():
    check = runpy.run_path(str(ROOT / 'tools/test.py'))['check_merges_masks']
    wrapper = type('DetTTAModel', (torch.nn.Module,), {})()
    wrapper.module = torch.nn.ModuleDict({'roi_head': torch.nn.ModuleDict({'bbox_head': torch.nn.Identity()})})
    check(SimpleNamespace(model=wrapper))
    wrapper.module['roi_head']['mask_head'] = torch.nn.Identity()
    with pytest.raises(ValueError, match='--tta merges boxes only, and this ModuleDict puts out masks'):
        check(SimpleNamespace(model=wrapper))


def test_types_as_classes(tmp_path, monkeypatch):
    """A config in pure Python: no default_scope, and classes for names."""
    path = tmp_path / 'lazy.py'
    path.write_text(
        'from mmengine.hooks import CheckpointHook\nfrom mmengine.optim import OptimWrapper\n'
        'from mmseg.models import EncoderDecoder\n'
        'default_scope = None\nmodel = dict(type=EncoderDecoder)\n'
        'default_hooks = dict(checkpoint=dict(type=CheckpointHook, interval=3))\n'
        'optim_wrapper = dict(type=OptimWrapper, dtype="bfloat16")\n'
    )
    args = SimpleNamespace(config=str(path), cfg_options=None, launcher='none', work_dir=None, local_rank=0, tune=None)
    config = load_config(args)
    assert config.default_scope == 'mmseg'
    assert config.default_hooks.checkpoint == dict(type='AdapterCheckpointHook', interval=3)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    enable_amp(config)
    assert config.optim_wrapper.type == 'AmpOptimWrapper'
    config.optim_wrapper.type = 'OptimWrapperDict'
    with pytest.raises(ValueError, match="--amp can not change optim_wrapper.type='OptimWrapperDict'"):
        enable_amp(config)


def test_a_subclass_of_the_checkpoint_hook_stays(tmp_path):
    path = tmp_path / 'config.py'
    hook = dict(type='AdapterCheckpointHook', interval=3)
    Config(dict(model=dict(type='mmseg.EncoderDecoder'), default_hooks=dict(checkpoint=hook))).dump(path)
    args = SimpleNamespace(config=str(path), cfg_options=None, launcher='none', work_dir=None, local_rank=0, tune=None)
    assert load_config(args).default_hooks.checkpoint == hook
