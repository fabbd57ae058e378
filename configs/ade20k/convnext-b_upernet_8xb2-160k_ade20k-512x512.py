_base_ = './swin-large-patch4-window7-in22k-pre_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(
    backbone=dict(_delete_=True, type='TIMMFeatures', model_name='convnext_base.fb_in22k', pretrained=True),
    decode_head=dict(in_channels=[128, 256, 512, 1024]),
    auxiliary_head=dict(in_channels=512),
)
