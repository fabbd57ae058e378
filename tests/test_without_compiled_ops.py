"""Detectors of mmdet beside an mmcv without compiled operators, and that they do as beside one with them."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


TRAIN = """
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
torch.manual_seed(0)
config = get_config('mmdet::{config}').model
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
print(f'compiler={{get_compiler_version()}} loss={{loss:.6f}} norm={{norm:.6f}} count={{count}}')
"""


def train(config, *folders):
    run = subprocess.run(
        [sys.executable, '-c', TRAIN.format(config=config)],
        env=os.environ | {'PYTHONPATH': os.pathsep.join(map(str, [*folders, ROOT]))},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    compiler, *numbers = re.search('compiler=(.*) loss=(.*) norm=(.*) count=(.*)', run.stdout).groups()
    return compiler, [float(number) for number in numbers]


@pytest.mark.parametrize('config', ['retinanet/retinanet_r18_fpn_1x_coco.py', 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'])
def test_detectors_train_and_predict(pure_mmcv, config):
    compiler, numbers = train(config, pure_mmcv)
    assert compiler == 'none: operators of e3va_mm.ops'
    compiler, expected = train(config)
    if compiler == 'none: operators of e3va_mm.ops':
        pytest.skip('mmcv has no compiled operators to compare with')
    assert numbers == pytest.approx(expected, rel=1e-4)
