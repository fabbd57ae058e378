_base_ = '../_base_/benchmarks/nuclei_mask2former.py'
model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='vit_tiny_patch16_224',
        checkpoint='data/weights/vit_tiny_patch16_224.pth',
    ),
    neck=dict(type='SimpleFeaturePyramid', in_channels=[192] * 4, out_channels=256),
    panoptic_head=dict(in_channels=[256] * 4),
)
