_base_ = './retinanet_swinv2-b_1x_voc0712.py'
model = dict(backbone=dict(model_name='convnext_base.fb_in22k'))
