_base_ = './cascade-mask-rcnn_dinov3-l_4conv1fc-giou_ms-3x_coco.py'
model = dict(
    backbone=dict(_delete_=True, type='TunedBackbone', backbone={{_base_.model.backbone}}, method=dict(type='Frozen'))
)
