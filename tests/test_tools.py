"""The tools, run as a user runs them, on the tiny data set."""

import importlib.util
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, swin, tool
from mmengine.config import Config

from e3va_mm.checkpoints.files import latest_checkpoint, read_checkpoint
from e3va_mm.launch import enable_amp, load_config


@pytest.fixture(scope='module')
def trained_seg(seg_config, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('seg')
    return work_dir, tool('tools/train.py', seg_config, '--work-dir', work_dir)


@pytest.fixture(scope='module')
def trained_det(det_config, tmp_path_factory):
    work_dir = tmp_path_factory.mktemp('det')
    return work_dir, tool('tools/train.py', det_config, '--work-dir', work_dir)


def losses(log: str) -> dict[int, str]:
    return {int(step): loss for step, loss in re.findall(r'Iter\(train\) \[\s*(\d+)/\d+\].* loss: ([\d.]+)', log)}


def metric(log: str, name: str) -> float:
    return float(re.findall(rf'{name}: ([\d.]+)', log)[-1])


def test_training_a_segmentor(trained_seg):
    work_dir, log = trained_seg
    assert re.search(r'highway +\d', log) and re.search(r'total +[\d,]+ +[\d,]+ +\d', log)
    assert 'eta:' in log and 'peak_memory_mib:' in log and 'mIoU:' in log
    assert json.loads((work_dir / 'run_report.json').read_text())['num_steps'] == 4
    checkpoint = read_checkpoint(work_dir / 'iter_4.pth')
    frozen = [key for key in checkpoint['state_dict'] if 'stages' in key]
    assert not frozen and 'backbone.base_fingerprint' in checkpoint['state_dict']


def test_training_a_detector(trained_det):
    work_dir, log = trained_det
    assert 'bbox_mAP:' in log and 'neck' in log
    assert (work_dir / 'run_report.json').is_file()


def test_testing_repeats_the_validation(trained_seg, seg_config, tmp_path):
    work_dir, log = trained_seg
    out = ['--out', tmp_path / 'out', '--show-dir', tmp_path / 'show', '--work-dir', tmp_path / 'test']
    tested = tool('tools/test.py', seg_config, work_dir / 'iter_4.pth', *out)
    assert metric(tested, 'mIoU') == metric(log, 'mIoU')
    assert len(list((tmp_path / 'out').glob('*.png'))) == 4
    assert len(list((tmp_path / 'show').rglob('*.png'))) == 4


def test_testing_a_detector(trained_det, det_config, tmp_path):
    work_dir, log = trained_det
    out = ['--out', tmp_path / 'out.pkl', '--show-dir', tmp_path / 'show', '--work-dir', tmp_path / 'test']
    tested = tool('tools/test.py', det_config, work_dir / 'iter_4.pth', *out)
    assert metric(tested, 'bbox_mAP') == metric(log, 'bbox_mAP')
    assert (tmp_path / 'out.pkl').is_file()
    assert len(list((tmp_path / 'test').rglob('show/*.png'))) == 4 or len(list(tmp_path.rglob('*.png'))) == 4


def test_tta(trained_seg, seg_config, trained_det, det_config, tmp_path):
    for (work_dir, _), config, name in ((trained_seg, seg_config, 'mIoU'), (trained_det, det_config, 'bbox_mAP')):
        tested = tool('tools/test.py', config, work_dir / 'iter_4.pth', '--tta', '--work-dir', tmp_path)
        assert metric(tested, name) >= 0


def test_init_model_and_init_detector(trained_seg, seg_config, trained_det, det_config, shapes):
    code = (
        'import sys, e3va_mm; from mmseg.apis import *; from mmdet.apis import *\n'
        'image = sys.argv[5]\n'
        "print(inference_model(init_model(sys.argv[1], sys.argv[2], 'cpu'), image).pred_sem_seg.data.shape)\n"
        "print(len(inference_detector(init_detector(sys.argv[3], sys.argv[4], device='cpu'), image).pred_instances))"
    )
    image = shapes / 'images/val/0000.png'
    checkpoints = [trained_seg[0] / 'iter_4.pth', trained_det[0] / 'iter_4.pth']
    log = tool('-c', code, seg_config, checkpoints[0], det_config, checkpoints[1], image)
    assert 'torch.Size([1, 64, 64])' in log


def test_infer(trained_seg, seg_config, trained_det, det_config, shapes, tmp_path):
    images = shapes / 'images/val'
    tool('tools/publish_adapter.py', trained_seg[0] / 'iter_4.pth', tmp_path / 'adapter.safetensors')
    tool('tools/infer.py', images, seg_config, tmp_path / 'adapter.safetensors', '--out-dir', tmp_path / 'seg')
    assert sorted(path.name for path in (tmp_path / 'seg').iterdir()) == [f'{i:04d}.png' for i in range(4)]
    one = [images / '0001.png', det_config, trained_det[0] / 'iter_4.pth', '--score-thr', '0.01']
    tool('tools/infer.py', *one, '--out-dir', tmp_path / 'det')
    assert [path.name for path in (tmp_path / 'det').iterdir()] == ['0001.png']


def test_publish_and_test_again(trained_seg, seg_config, tmp_path):
    work_dir, log = trained_seg
    tool('tools/publish_adapter.py', work_dir / 'iter_4.pth', tmp_path / 'adapter.safetensors')
    tool('tools/publish_adapter.py', tmp_path / 'adapter.safetensors', tmp_path / 'adapter.pth')
    for name in ('adapter.safetensors', 'adapter.pth'):
        tested = tool('tools/test.py', seg_config, tmp_path / name, '--work-dir', tmp_path / 'test')
        assert metric(tested, 'mIoU') == metric(log, 'mIoU')


@pytest.mark.parametrize('sent', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_interrupted_and_resumed(trained_seg, seg_config, tmp_path, sent):
    """Stopped after a checkpoint at some moment, then resumed: the same losses as the uninterrupted run."""
    command = [sys.executable, 'tools/train.py', str(seg_config), '--work-dir', str(tmp_path)]
    with open(tmp_path / 'cut.log', 'w') as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
            # A shell's background jobs, and all that they start, ignore SIGINT.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    while not (tmp_path / 'iter_2.pth').exists() and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(sent)
    process.wait()
    assert latest_checkpoint(tmp_path) is not None
    resumed = losses(tool('tools/train.py', seg_config, '--work-dir', tmp_path, '--resume'))
    assert resumed
    whole = losses(trained_seg[1])
    assert all(whole[step] == loss for step, loss in resumed.items())
    ends = (read_checkpoint(path / 'iter_4.pth')['state_dict'] for path in (trained_seg[0], tmp_path))
    assert all(torch.equal(one, other) for one, other in zip(*(end.values() for end in ends)))


def test_resume_without_a_checkpoint_starts(seg_config, tmp_path):
    log = tool(
        'tools/train.py', seg_config, '--work-dir', tmp_path, '--resume', '--cfg-options', 'train_cfg.max_iters=1'
    )
    assert 'no checkpoint' in log and (tmp_path / 'iter_1.pth').is_file()


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


def test_load_from_keeps_adapters_for_another_head(trained_seg, seg_config, tmp_path):
    options = [f'load_from={trained_seg[0] / "iter_4.pth"}', 'train_cfg.max_iters=1', 'model.decode_head.channels=8']
    assert 'size mismatch' in tool('tools/train.py', seg_config, '--work-dir', tmp_path, '--cfg-options', *options)


def test_accumulation_ema_and_checkpointed_heads(seg_config, tmp_path):
    options = [
        'optim_wrapper.accumulative_counts=2',
        'custom_hooks.0.type=EMAHook',
        'model.backbone.backbone.with_cp=True',
        'model.backbone.frozen_dtype=bfloat16',
        'model.backbone.saved_dtype=float8_e4m3fn',
    ]
    log = tool('tools/train.py', seg_config, '--work-dir', tmp_path, '--cfg-options', *options)
    tested = tool(
        'tools/test.py', seg_config, tmp_path / 'iter_4.pth', '--work-dir', tmp_path, '--cfg-options', *options
    )
    assert metric(tested, 'mIoU') == metric(log, 'mIoU')


def test_two_processes(seg_config, tmp_path, request):
    """DDP over gloo on the CPU, without find_unused_parameters; every rank ends with the same parameters."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    command = ['bash', 'tools/dist_train.sh', seg_config, '2', '--work-dir', tmp_path]
    environment = {**os.environ, 'PORT': port, 'PYTHON': sys.executable, 'OMP_NUM_THREADS': '1'}
    call = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert call.returncode == 0, call.stdout[-2000:] + call.stderr[-2000:]
    assert 'SyncBN needs GPUs' in call.stdout + call.stderr
    assert json.loads((tmp_path / 'run_report.json').read_text())['num_devices'] == 2
    command = ['bash', 'tools/dist_test.sh', seg_config, tmp_path / 'iter_4.pth', '2', '--work-dir', tmp_path / 'test']
    call = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert call.returncode == 0, call.stdout[-2000:] + call.stderr[-2000:]
    assert metric(call.stdout + call.stderr, 'mIoU') >= 0


def spoil(source, target, key):
    checkpoint = torch.load(source, weights_only=True)
    del checkpoint['state_dict'][key]
    torch.save(checkpoint, target)


@pytest.fixture
def error_of(monkeypatch):
    """What a tool raises; in this process, since it takes seconds to import the toolboxes."""

    def run(name, *arguments) -> str:
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, 'argv', [name, *map(str, arguments)])
        # The tools set it for their process, which is this one here.
        monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
        with pytest.raises(Exception) as raised:
            runpy.run_path(name, run_name='__main__')
        return str(raised.value)

    return run


def test_bad_checkpoints(trained_seg, seg_config, tmp_path, error_of):
    whole = trained_seg[0] / 'iter_4.pth'
    truncated = tmp_path / 'truncated.pth'
    truncated.write_bytes(whole.read_bytes()[:-1000])
    spoil(whole, tmp_path / 'headless.pth', 'decode_head.conv_seg.weight')
    expectations = {
        tmp_path / 'missing.pth': 'missing.pth does not exist',
        truncated: r'truncated.pth \(\d+ bytes\) is damaged',
        tmp_path / 'headless.pth': r"1 keys missing \['decode_head.conv_seg.weight'\]",
    }
    for path, message in expectations.items():
        assert re.search(message, error_of('tools/test.py', seg_config, path, '--work-dir', tmp_path)), path


class Boom:
    """Writes a file where it is unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), 'w'))


def test_no_file_of_a_stock_module_runs_code(trained_seg, seg_config, shapes, tmp_path, error_of):
    """mmengine's loader, which reads an init_cfg of a head, would fall back to running it."""
    torch.save({'state_dict': Boom(tmp_path / 'boom.txt')}, tmp_path / 'evil.pth')
    head = [f'model.decode_head.init_cfg.{key}' for key in (f'checkpoint={tmp_path / "evil.pth"}', 'type=Pretrained')]
    assert 'weights_only' in error_of('tools/train.py', seg_config, '--work-dir', tmp_path, '--cfg-options', *head)
    checkpoint = torch.load(trained_seg[0] / 'iter_4.pth', weights_only=True)
    torch.save({**checkpoint, 'message_hub': Boom(tmp_path / 'boom.txt')}, tmp_path / 'evil.pth')
    image = shapes / 'images/val/0000.png'
    for name, arguments in {
        'tools/test.py': [seg_config, tmp_path / 'evil.pth', '--work-dir', tmp_path],
        'tools/train.py': [seg_config, '--resume', tmp_path / 'evil.pth', '--work-dir', tmp_path],
        'tools/infer.py': [image, seg_config, tmp_path / 'evil.pth', '--out-dir', tmp_path],
        'tools/publish_adapter.py': [tmp_path / 'evil.pth', tmp_path / 'evil.safetensors'],
    }.items():
        assert 'unsafe to load: it holds io.open' in error_of(name, *arguments), name
    assert not (tmp_path / 'boom.txt').exists()


def test_a_head_of_other_classes(trained_seg, seg_config, shapes, tmp_path, error_of):
    options = ['--cfg-options', 'model.decode_head.num_classes=7', 'model.auxiliary_head.num_classes=7']
    message = r'4 keys of another shape .*decode_head.conv_seg.weight \(6, 16, 1, 1\), in the model \(7, 16, 1, 1\)'
    whole = trained_seg[0] / 'iter_4.pth'
    checkpoint = torch.load(whole, weights_only=True)
    checkpoint['state_dict'] = {f'module.{key}': value for key, value in checkpoint['state_dict'].items()}
    torch.save(checkpoint, tmp_path / 'ddp.pth')
    for path in (whole, tmp_path / 'ddp.pth'):
        error = error_of('tools/test.py', seg_config, path, '--work-dir', tmp_path, *options)
        assert re.search(message, error), error
    image = shapes / 'images/val/0000.png'
    error = error_of('tools/infer.py', image, seg_config, whole, '--out-dir', tmp_path, *options)
    assert re.search(message, error), error


def test_bad_inputs(seg_config, tmp_path, error_of):
    expectations = {
        'model.backbone.adapter.rank=0': 'adapter.rank must be an integer of at least 1, got 0',
        'model.backbone.adapter.rnak=4': r"unknown option \['rnak'\]",
        'model.backbone.backbone.type=Swim': "backbone.type 'Swim' can not be built; supported are",
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
    backbone = dict(type='TunedBackbone', backbone=swin(init_cfg=dict(type='Pretrained', checkpoint=weights)))
    Config(dict(default_scope='mmseg', model=dict(backbone=backbone))).dump(tmp_path / 'config.py')
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
    args = SimpleNamespace(config=str(path), cfg_options=None, launcher='none', work_dir=None, local_rank=0)
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
    args = SimpleNamespace(config=str(path), cfg_options=None, launcher='none', work_dir=None, local_rank=0)
    assert load_config(args).default_hooks.checkpoint == hook


@pytest.mark.parametrize('absent', ['mmseg', 'mmdet'])
def test_import_with_one_toolbox_only(absent):
    code = (
        f'import sys; sys.modules[{absent!r}] = None\n'
        'import e3va_mm; from mmengine.registry import MODELS\n'
        f'scope = {({"mmseg", "mmdet"} - {absent}).pop()!r}\n'
        "model = MODELS.build(dict(type='E3VABackbone', backbone=dict(type=f'{scope}.SwinTransformer', embed_dims=12,\n"
        '    depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))))\n'
        "print('built', type(model.backbone).__module__)"
    )
    assert f'built {({"mmseg", "mmdet"} - {absent}).pop()}' in tool('-c', code)


def test_torchvision_imports_beside_this_torch():
    if importlib.util.find_spec('torchvision') is None:
        pytest.skip('torchvision is not installed')
    assert 'ok' in tool('-c', "import e3va_mm, torchvision; print('ok')")
