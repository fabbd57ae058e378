_base_ = './retinanet_eva02-l_1x_voc0712.py'
model = dict(backbone=dict(_delete_=True, type='E3VABackbone', backbone={{_base_.model.backbone}}))
