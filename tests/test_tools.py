"""The tools, run as a user runs them, on the tiny data set."""

import importlib.util
import json
import re
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, tool
from mmengine.config import Config

from benchmarks.tests.forked import environment
from e3va_mm.checkpoints.files import read_checkpoint
from e3va_mm.checkpoints.latest import latest_checkpoint


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
    tested = tool('tools/test.py', seg_config, tmp_path / 'adapter.safetensors', '--work-dir', tmp_path / 'test')
    assert metric(tested, 'mIoU') == metric(log, 'mIoU')
    back = tmp_path / 'adapter.safetensors', tmp_path / 'back.pth', '--half'
    assert '--half is for a .safetensors target' in tool('tools/publish_adapter.py', *back, ok=False)


@pytest.mark.parametrize('sent', [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_resumed(trained_seg, seg_config, tmp_path, sent):
    """Stopped after a checkpoint at some moment, then resumed: the same losses as the uninterrupted run."""
    command = [sys.executable, 'tools/train.py', str(seg_config), '--work-dir', str(tmp_path)]
    with open(tmp_path / 'cut.log', 'w') as log:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=log,
            stderr=log,
            env=environment(),
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


def test_two_processes(seg_config, tmp_path):
    """A stock config, DDP over gloo on the CPU, without find_unused_parameters; every rank ends with the same."""
    config = Config.fromfile(seg_config)
    config.model.backbone = config.model.backbone.backbone
    config.dump(tmp_path / 'two.py')
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    arguments = [tmp_path / 'two.py', '2', '--tune', 'e3va', '--work-dir', tmp_path / 'run']
    command = ['bash', 'tools/dist_train.sh', *arguments]
    variables = environment(PORT=port, PYTHON=sys.executable)
    call = subprocess.run([*map(str, command)], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert call.returncode == 0, call.stdout[-2000:] + call.stderr[-2000:]
    assert 'SyncBN needs GPUs' in call.stdout + call.stderr
    assert len(re.findall(r'Each of 2 processes exchanges \d+\.\d MiB', call.stdout + call.stderr)) == 1
    report = json.loads((tmp_path / 'run/run_report.json').read_text())
    assert report['num_devices'] == 2 and report['parameters']['highway']['trainable']
    trained = tmp_path / 'run/two.py', tmp_path / 'run/iter_4.pth'
    command = ['bash', 'tools/dist_test.sh', *trained, '2', '--work-dir', tmp_path / 'test']
    call = subprocess.run([*map(str, command)], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert call.returncode == 0, call.stdout[-2000:] + call.stderr[-2000:]
    assert metric(call.stdout + call.stderr, 'mIoU') >= 0


def spoil(source, target, key):
    checkpoint = torch.load(source, weights_only=True)
    del checkpoint['state_dict'][key]
    torch.save(checkpoint, target)


def test_bad_checkpoints(trained_seg, seg_config, tmp_path, error_of):
    whole = trained_seg[0] / 'iter_4.pth'
    truncated = tmp_path / 'truncated.pth'
    truncated.write_bytes(whole.read_bytes()[:-1000])
    spoil(whole, tmp_path / 'headless.pth', 'decode_head.conv_seg.weight')
    expectations = {
        tmp_path / 'missing.pth': 'missing.pth does not exist',
        truncated: r'truncated.pth \(\d+ bytes\) is damaged',
        tmp_path / 'headless.pth': '1 keys missing: decode_head.conv_seg.weight',
    }
    for path, message in expectations.items():
        assert re.search(message, error_of('tools/test.py', seg_config, path, '--work-dir', tmp_path)), path


def test_a_head_of_other_classes(trained_seg, seg_config, shapes, tmp_path, error_of):
    options = ['--cfg-options', 'model.decode_head.num_classes=7', 'model.auxiliary_head.num_classes=7']
    message = r'4 keys of another shape: .*conv_seg.weight \(6, 16, 1, 1\) where the model has \(7, 16, 1, 1\)'
    whole, image = trained_seg[0] / 'iter_4.pth', shapes / 'images/val/0000.png'
    for tool_and_arguments in (
        ('tools/test.py', seg_config, whole, '--work-dir', tmp_path),
        ('tools/infer.py', image, seg_config, whole, '--out-dir', tmp_path),
    ):
        error = error_of(*tool_and_arguments, *options)
        assert re.search(message, error), error


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
