_base_ = './cascade-mask-rcnn_swin-l-p4-w7_fpn_4conv1fc-giou_ms-3x_coco.py'
model = dict(
    backbone=dict(_delete_=True, type='TIMMFeatures', model_name='vit_large_patch14_dinov2.lvd142m', pretrained=True),
    neck=dict(_delete_=True, type='SimpleFeaturePyramid', in_channels=[1024] * 4, out_channels=256, num_outs=5),
)
