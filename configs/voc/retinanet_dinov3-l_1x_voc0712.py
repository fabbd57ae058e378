_base_ = './retinanet_dinov2-l_1x_voc0712.py'
model = dict(backbone=dict(model_name='vit_large_patch16_dinov3.lvd1689m'))
