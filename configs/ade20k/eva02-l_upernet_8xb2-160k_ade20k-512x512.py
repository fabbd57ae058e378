_base_ = './swin-large-patch4-window7-in22k-pre_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(
    # As EVA-02 was trained.
    data_preprocessor=dict(mean=[122.771, 116.746, 104.094], std=[68.501, 66.632, 70.323]),
    backbone=dict(_delete_=True, type='TIMMFeatures', model_name='eva02_large_patch14_224.mim_m38m', pretrained=True),
    neck=dict(type='SimpleFeaturePyramid', in_channels=[1024] * 4, out_channels=256),
    decode_head=dict(in_channels=[256] * 4),
    auxiliary_head=dict(in_channels=256),
)
