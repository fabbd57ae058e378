_base_ = './cascade-mask-rcnn_dinov2-l_4conv1fc-giou_ms-3x_coco.py'
model = dict(backbone=dict(model_name='vit_large_patch16_dinov3.lvd1689m'))
