_base_ = './cascade-mask-rcnn_swin-l-p4-w7_fpn_4conv1fc-giou_ms-3x_coco.py'
model = dict(
    backbone=dict(_delete_=True, type='TIMMFeatures', model_name='swinv2_base_window12_192.ms_in22k', pretrained=True),
    neck=dict(in_channels=[128, 256, 512, 1024]),
)
