"""Rotated boxes: a config of mmrotate under the flag, by the tools, where mmrotate is installed."""

import cv2
import mmengine
import numpy as np
import pytest
import torch
from conftest import tool
from mmengine.registry import MODELS

from e3va_mm.ops import stand_in

pytest.importorskip('mmrotate', reason='needs mmrotate: the extra rotate')
if stand_in():
    pytest.skip("rotated boxes need mmcv's compiled operators", allow_module_level=True)

NAME = 'rotated-retinanet-rbox-le90_r50_fpn_1x_dota'
CONFIG = """
_base_ = 'mmrotate::rotated_retinanet/{name}.py'
data_root = '{root}/'
model = dict(
    backbone=dict(base_channels=4, init_cfg=dict(checkpoint='{root}/resnet.pth')),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=8),
    bbox_head=dict(num_classes=1, in_channels=8, feat_channels=8, stacked_convs=1),
    test_cfg=dict(score_thr=0.0, max_per_img=5, nms_pre=10),
)
train_pipeline, val_pipeline = _base_.train_pipeline, _base_.val_pipeline
train_pipeline[3].scale = val_pipeline[1].scale = (128, 128)
data = dict(data_root=data_root, ann_file='labels/', data_prefix=dict(img_path='images/'),
            metainfo=dict(classes=('plane',), palette=[(255, 0, 0)]))
here = dict(num_workers=0, persistent_workers=False)
train_cfg = dict(max_epochs=1, val_interval=2)
train_dataloader = dict(dataset=dict(pipeline=train_pipeline, **data), **here)
val_dataloader = dict(dataset=dict(pipeline=val_pipeline, **data), **here)
test_dataloader = val_dataloader
# The config's own starts four processes, which takes a minute.
val_evaluator = test_evaluator = dict(_delete_=True, type='mmdet.DumpDetResults', out_file_path='{root}/all.pkl')
"""


@pytest.fixture
def dota(tmp_path):
    """Four images with a tilted plane each, as DOTA has them."""
    for folder in ('images', 'labels'):
        (tmp_path / folder).mkdir()
    corners = np.array([[20, 30], [80, 50], [70, 80], [10, 60]])
    for number in range(4):
        image = np.random.default_rng(number).integers(100, size=(128, 128, 3), dtype=np.uint8)
        cv2.fillPoly(image, [corners], (255, 255, 255))
        cv2.imwrite(str(tmp_path / 'images' / f'{number}.png'), image)
        (tmp_path / 'labels' / f'{number}.txt').write_text(' '.join(map(str, corners.flatten())) + ' plane 0\n')
    return tmp_path


def test_a_rotated_detector_by_the_tools(dota):
    torch.save(MODELS.build(dict(type='mmdet.ResNet', depth=50, base_channels=4)).state_dict(), dota / 'resnet.pth')
    (dota / f'{NAME}.py').write_text(CONFIG.format(name=NAME, root=dota))
    work_dir, pictures = dota / 'work', dota / 'pictures'
    train = 'tools/train.py', dota / f'{NAME}.py', '--tune', 'e3va', '--work-dir', work_dir
    assert 'tune: model.backbone: ResNet is frozen and wrapped by E3VABackbone' in tool(*train)
    trained = work_dir / f'{NAME}.py', work_dir / 'epoch_1.pth'
    tool('tools/test.py', *trained, '--out', dota / 'boxes.pkl', '--work-dir', dota / 'test')
    boxes = [each['pred_instances']['bboxes'] for each in mmengine.load(dota / 'boxes.pkl')]
    assert len(boxes) == 4 and all(each.shape[1] == 5 for each in boxes)  # the last is the angle
    tool('tools/infer.py', dota / 'images', *trained, '--out-dir', pictures, '--score-thr', '0')
    assert len(list(pictures.glob('*.png'))) == 4
