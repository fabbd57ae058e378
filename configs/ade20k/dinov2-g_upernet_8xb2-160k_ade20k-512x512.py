_base_ = './dinov2-l_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(model_name='vit_giant_patch14_dinov2.lvd142m'),
    neck=dict(in_channels=[1536] * 4),
)
