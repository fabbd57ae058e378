_base_ = './cascade-mask-rcnn_swin-t-p4-w7_fpn_4conv1fc-giou_ms-3x_coco.py'
model = dict(backbone=dict(_delete_=True, type='E3VABackbone', backbone={{_base_.model.backbone}}))
