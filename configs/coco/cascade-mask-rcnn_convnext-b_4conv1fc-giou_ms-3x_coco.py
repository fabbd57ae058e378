_base_ = './cascade-mask-rcnn_swinv2-b_4conv1fc-giou_ms-3x_coco.py'
model = dict(backbone=dict(model_name='convnext_base.fb_in22k'))
