_base_ = '../../configs/ade20k/dinov3-l_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(model_name='vit_small_patch16_dinov3.lvd1689m'),
    neck=dict(in_channels=[384] * 4),
)
