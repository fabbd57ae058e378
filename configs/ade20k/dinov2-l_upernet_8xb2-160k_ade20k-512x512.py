_base_ = './swin-large-patch4-window7-in22k-pre_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(_delete_=True, type='TIMMFeatures', model_name='vit_large_patch14_dinov2.lvd142m', pretrained=True),
    neck=dict(type='SimpleFeaturePyramid', in_channels=[1024] * 4, out_channels=256),
    decode_head=dict(in_channels=[256] * 4),
    auxiliary_head=dict(in_channels=256),
)
