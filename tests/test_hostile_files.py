"""Files of weights that would run code, wherever a config or a command names them."""

import pytest
import torch
from conftest import Hostile, build, pretrained, swin, timm_features

from e3va_mm.checkpoints.errors import CheckpointMismatchError, DamagedCheckpointError
from e3va_mm.checkpoints.files import read_checkpoint


def test_a_checkpoint_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({'state_dict': Hostile(tmp_path / 'boom.txt')}, 'evil.pth')
    with pytest.raises(DamagedCheckpointError, match=r'unsafe to load: it holds io\.open beside tensors'):
        read_checkpoint('evil.pth')
    assert not (tmp_path / 'boom.txt').exists()


@pytest.mark.parametrize('kind', ['base', 'adapter', 'url', 'timm'])
def test_no_config_makes_a_file_run_code(weights, tmp_path, monkeypatch, kind):
    """The loaders of the toolboxes would fall back to running it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    cached = tmp_path / 'hub' / 'checkpoints' / 'evil.pth'
    cached.parent.mkdir(parents=True)
    torch.save({'state_dict': Hostile(tmp_path / 'boom.txt')}, cached)
    init_cfg = dict(type='Pretrained', checkpoint='http://localhost/evil.pth' if kind == 'url' else str(cached))
    config = pretrained(weights, init_cfg=init_cfg)
    if kind != 'adapter':
        config = dict(backbone=timm_features(init_cfg=init_cfg) if kind == 'timm' else swin(init_cfg=init_cfg))
    with pytest.raises(CheckpointMismatchError, match=r'evil\.pth.* unsafe: it holds io\.open beside tensors'):
        build(**config).init_weights()
    assert not (tmp_path / 'boom.txt').exists()


def test_no_file_of_a_stock_module_runs_code(seg_config, shapes, tmp_path, error_of):
    """mmengine's loader, which reads an init_cfg of a head, would fall back to running it."""
    torch.save({'state_dict': Hostile(tmp_path / 'boom.txt')}, tmp_path / 'evil.pth')
    head = [f'model.decode_head.init_cfg.{key}' for key in (f'checkpoint={tmp_path / "evil.pth"}', 'type=Pretrained')]
    assert 'weights_only' in error_of('tools/train.py', seg_config, '--work-dir', tmp_path, '--cfg-options', *head)
    torch.save({'state_dict': {}, 'message_hub': Hostile(tmp_path / 'boom.txt')}, tmp_path / 'evil.pth')
    image = shapes / 'images/val/0000.png'
    for name, arguments in {
        'tools/test.py': [seg_config, tmp_path / 'evil.pth', '--work-dir', tmp_path],
        'tools/train.py': [seg_config, '--resume', tmp_path / 'evil.pth', '--work-dir', tmp_path],
        'tools/infer.py': [image, seg_config, tmp_path / 'evil.pth', '--out-dir', tmp_path],
        'tools/publish_adapter.py': [tmp_path / 'evil.pth', tmp_path / 'evil.safetensors'],
    }.items():
        assert 'unsafe to load: it holds io.open' in error_of(name, *arguments), name
    assert not (tmp_path / 'boom.txt').exists()
