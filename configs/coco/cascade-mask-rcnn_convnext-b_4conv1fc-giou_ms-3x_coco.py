_base_ = './cascade-mask-rcnn_swin-l-p4-w7_fpn_4conv1fc-giou_ms-3x_coco.py'
model = dict(
    backbone=dict(_delete_=True, type='TIMMFeatures', model_name='convnext_base.fb_in22k', pretrained=True),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
