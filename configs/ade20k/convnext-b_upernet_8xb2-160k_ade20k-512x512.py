_base_ = './swinv2-b_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(backbone=dict(model_name='convnext_base.fb_in22k'))
