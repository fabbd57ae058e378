_base_ = './cascade-mask-rcnn_dinov2-l_4conv1fc-giou_ms-3x_coco.py'
model = dict(backbone=dict(_delete_=True, type='E3VABackbone', backbone={{_base_.model.backbone}}))
