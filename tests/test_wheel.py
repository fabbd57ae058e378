"""The wheel, built from the source distribution and installed into a folder of its own, without the repository."""

import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT

import e3va_mm
from benchmarks.tests.forked import environment

NAME = 'camvid/e3va-swin-nano_upernet_1xb16-600_camvid-352x480'
# What a small machine needs, and images of another size.
_SMALL = [
    'train_cfg.max_iters=2',
    'train_cfg.val_interval=2',
    'default_hooks.logger.interval=1',
    'default_hooks.checkpoint.interval=2',
    *(f'{kind}_dataloader.{option}' for kind in ('train', 'val') for option in ('batch_size=2', 'num_workers=0')),
    *(f'{kind}_dataloader.persistent_workers=False' for kind in ('train', 'val')),
]


def run(*command, cwd: Path, path='') -> str:
    """What a command prints that succeeds, with the package in the folder ``path``."""
    call = subprocess.run(
        [*map(str, command)],
        cwd=cwd,
        env=environment(str(path)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert call.returncode == 0, call.stdout[-3000:]
    return call.stdout


@pytest.fixture(scope='module')
def site(tmp_path_factory) -> Path:
    """Where the package lies, as pip installs it."""
    folder = tmp_path_factory.mktemp('build')
    clone, site = folder / 'clone', folder / 'site'
    others = {'.git', '.venv', 'build', 'data', 'dist', 'work_dirs'}
    shutil.copytree(ROOT, clone, ignore=lambda folder, names: others if Path(folder) == ROOT else ())
    run(sys.executable, '-c', "from setuptools import build_meta; build_meta.build_sdist('..')", cwd=clone)
    (source,) = folder.glob('*.tar.gz')
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'install', '--no-deps', '--no-index']
    run(*pip, '--no-build-isolation', '--target', site, source, cwd=folder)
    return site


@pytest.fixture(scope='module')
def data(tmp_path_factory) -> Path:
    """Two images in CamVid's layout."""
    root, random = tmp_path_factory.mktemp('camvid'), np.random.default_rng(0)
    for split in ('train', 'val'):
        for kind, shape, most, suffix in (('images', (96, 96, 3), 256, 'jpg'), ('annotations', (96, 96), 11, 'png')):
            (root / kind / split).mkdir(parents=True)
            for name in (f'0.{suffix}', f'1.{suffix}'):
                cv2.imwrite(str(root / kind / split / name), random.integers(0, most, shape, np.uint8))
    return root


@pytest.fixture(scope='module')
def trained(site, data, tmp_path_factory) -> tuple[Path, str]:
    """A config trained by its name: the folder of the run, and its log."""
    folder = tmp_path_factory.mktemp('run')
    paths = [f'{kind}_dataloader.dataset.data_root={data}' for kind in ('train', 'val', 'test')]
    options = [*_SMALL, *paths]
    command = [site / 'bin/e3va-train', f'e3va_mm::{NAME}', '--work-dir', folder, '--cfg-options', *options]
    return folder, run(*command, cwd=folder, path=site)


def test_a_config_is_trained_by_its_name(trained):
    folder, log = trained
    assert len(re.findall(r'Iter\(train\)', log)) == 2 and 'mIoU:' in log
    assert (folder / 'iter_2.pth').is_file()


def test_a_checkpoint_alone_is_tested(site, trained, tmp_path):
    """By the config that it holds, and with flags before it."""
    folder, log = trained
    command = [site / 'bin/e3va-test', '--work-dir', tmp_path, folder / 'iter_2.pth']
    tested = run(*command, cwd=tmp_path, path=site)
    metrics = [re.findall(r'mIoU: ([\d.]+)', printed)[-1] for printed in (log, tested)]
    assert metrics[0] == metrics[1]


def test_an_adapter_alone_predicts(site, data, trained, tmp_path):
    """Its config is in it; the pictures are those that config and checkpoint give."""
    folder, _ = trained
    config = folder / f'{Path(NAME).name}.py'
    run(site / 'bin/e3va-publish', folder / 'iter_2.pth', 'adapter.safetensors', cwd=tmp_path, path=site)
    for arguments, target in (['adapter.safetensors'], 'alone'), ([config, folder / 'iter_2.pth'], 'both'):
        command = [site / 'bin/e3va-infer', data / 'images/val', '--out-dir', target, *arguments]
        run(*command, cwd=tmp_path, path=site)
    alone, both = (sorted((tmp_path / target).iterdir()) for target in ('alone', 'both'))
    assert [picture.name for picture in alone] == ['0.png', '1.png']
    assert [one.read_bytes() for one in alone] == [other.read_bytes() for other in both]


def test_a_checkpoint_without_a_config_can_not_stand_alone(data, tmp_path, error_of):
    torch.save({'state_dict': {}}, tmp_path / 'bare.pth')
    error = error_of('tools/infer.py', data / 'images/val', '--out-dir', tmp_path / 'out', tmp_path / 'bare.pth')
    assert error == f'{tmp_path}/bare.pth holds no config: give the one that it was trained with'


def test_a_config_may_derive_from_one_of_the_package(site, tmp_path):
    """The variables of its base are those of the toolbox: a base of this package has no scope of its own."""
    lines = ["_base_ = 'e3va_mm::bccd/retinanet_swin-nano_fpn_1xb8-400_bccd.py'"]
    lines += ["model = dict(backbone=dict(_delete_=True, type='E3VABackbone', backbone={{_base_.model.backbone}}))"]
    (tmp_path / 'mine.py').write_text('\n'.join(lines))
    code = (
        'import sys, e3va_mm; from mmengine.config import Config\n'
        "config = Config.fromfile('mine.py')\n"
        "print(e3va_mm.__file__, config.default_scope, config.model.backbone.backbone.get('_scope_'))"
    )
    for root in (site, ROOT):
        printed = run(sys.executable, '-c', code, cwd=tmp_path, path=root)
        assert f'{root / "e3va_mm/__init__.py"} mmdet None' in printed


def test_what_the_wheel_brings(site):
    brought = {str(path.relative_to(site / 'e3va_mm/.mim')) for path in (site / 'e3va_mm/.mim').rglob('*.py')}
    configs = {str(path.relative_to(ROOT)) for path in (ROOT / 'configs').rglob('*.py')}
    tools = {f'tools/{name}.py' for name in ('train', 'test', 'infer', 'export', 'merge', 'publish_adapter')}
    assert brought == configs | tools
    (installed,) = metadata.distributions(name='e3va_mm', path=[str(site)])
    assert installed.version == e3va_mm.__version__
    # mim takes the first folder of this list, as pip sorts it, for the package.
    first = min(map(str, installed.files)).partition('/')[0]
    assert (site / first / '.mim/model-index.yml').is_file()


def test_the_index_lists_every_folder(site):
    index = yaml.safe_load((site / 'e3va_mm/.mim/model-index.yml').read_text())['Import']
    assert index == sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'configs').glob('*/metafile.yml'))
    assert all((site / 'e3va_mm/.mim' / path).is_file() for path in index)
