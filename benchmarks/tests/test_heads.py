"""Heads of every kind under ``--tune e3va``, each by its stock config: a training step, predictions, a round trip."""

import pytest

from benchmarks.coverage import StockConfig
from benchmarks.coverage_trial import attempt

HEADS = {
    'Mask2Former, semantic': 'mmseg::mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py',
    'Mask2Former, instances': 'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
    'Mask2Former, panoptic': 'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco-panoptic.py',
    'DINO': 'mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py',
    'Deformable DETR': 'mmdet::deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'RTMDet-Ins': 'mmdet::rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
    'Faster R-CNN': 'mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'DeepLabV3+': 'mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py',
    'SegFormer': 'mmseg::segformer/segformer_mit-b2_8xb2-160k_ade20k-512x512.py',
    'KNet': 'mmseg::knet/knet-s3_r50-d8_upernet_8xb2-adamw-80k_ade20k-512x512.py',
}


@pytest.mark.parametrize('name', HEADS.values(), ids=HEADS)
def test_a_head_trains_behind_a_highway(name):
    trial = StockConfig(name).trial('e3va', pixels=64)
    assert attempt(*trial.steps()) == {}
    trained = {key for key, parameter in trial.model.named_parameters() if parameter.requires_grad}
    family = trial.model.backbone.family
    expected = ('backbone.highway.', 'backbone.mixers.', *(f'backbone.backbone.{norm}.' for norm in family.norm_names))
    assert all(key.startswith(expected) for key in trained if key.startswith('backbone.'))
    heads = {key for key, _ in trial.model.named_parameters() if not key.startswith('backbone.')}
    assert heads <= trained, 'heads and necks train as in the stock config'
    assert trial.predictions
