"""Detectors of mmdet beside an mmcv without compiled operators, and that they do as beside one with them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.tests.forked import environment

pytest.importorskip('mmdet')
ROOT = Path(__file__).parent.parent


@pytest.fixture(scope='module')
def pure_mmcv(tmp_path_factory):
    """A folder with an mmcv of links to all but its compiled operators: what its pure wheel holds."""
    folder = tmp_path_factory.mktemp('pure')
    (folder / 'mmcv').mkdir()
    for path in Path(importlib.util.find_spec('mmcv').origin).parent.iterdir():
        if not path.name.startswith(('_ext', '__pycache__')):
            (folder / 'mmcv' / path.name).symlink_to(path)
    return folder


CONFIGS = ('retinanet/retinanet_r18_fpn_1x_coco.py', 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
TRAIN = """
import sys

import torch
import e3va_mm
from mmcv.ops import get_compiler_version
from mmdet.registry import MODELS
from mmdet.testing import demo_mm_inputs
from mmdet.utils import register_all_modules
from mmengine.hub import get_config
from mmengine.utils.dl_utils.misc import mmcv_full_available

assert mmcv_full_available()
register_all_modules(init_default_scope=True)
for name in sys.argv[1:]:
    torch.manual_seed(0)
    config = get_config(f'mmdet::{name}').model
    config.backbone.update(init_cfg=None, frozen_stages=-1)
    model = MODELS.build(config)
    data = demo_mm_inputs(2, [[3, 128, 96], [3, 96, 128]], num_items=[3, 0], with_mask=True, use_box_type=False)
    loss, logged = model.parse_losses(model(**model.data_preprocessor(data, True), mode='loss'))
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    model.eval()
    with torch.no_grad():
        results = model(**model.data_preprocessor(data, False), mode='predict')
    count = len(results[0].pred_instances)
    print(f'compiler={get_compiler_version()} loss={loss:.6f} norm={norm:.6f} count={count}')
"""


def train(*folders) -> list[tuple[str, list[float]]]:
    """Of each config, which compiler mmcv names, and loss, norm of the gradients and number of predictions."""
    run = subprocess.run(
        [sys.executable, '-c', TRAIN, *CONFIGS],
        env=environment(os.pathsep.join(map(str, [*folders, ROOT]))),
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = re.findall('compiler=(.*) loss=(.*) norm=(.*) count=(.*)', run.stdout)
    assert len(found) == len(CONFIGS)
    return [(compiler, [float(number) for number in numbers]) for compiler, *numbers in found]


def test_detectors_train_and_predict(pure_mmcv):
    pure, installed = train(pure_mmcv), train()
    assert {compiler for compiler, _ in pure} == {'none: operators of e3va_mm.ops'}
    if pure[0][0] == installed[0][0]:
        pytest.skip('mmcv has no compiled operators to compare with')
    for (_, numbers), (_, expected) in zip(pure, installed):
        assert numbers == pytest.approx(expected, rel=1e-4)
