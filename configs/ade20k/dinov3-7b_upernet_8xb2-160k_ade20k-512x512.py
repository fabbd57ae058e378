_base_ = './dinov3-l_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(model_name='vit_7b_patch16_dinov3.lvd1689m'),
    neck=dict(in_channels=[4096] * 4),
)
