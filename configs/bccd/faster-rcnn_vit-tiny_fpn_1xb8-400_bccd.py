_base_ = '../_base_/benchmarks/bccd_faster-rcnn.py'
model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='vit_tiny_patch16_224',
        checkpoint='data/weights/vit_tiny_patch16_224.pth',
    ),
    neck=dict(_delete_=True, type='SimpleFeaturePyramid', in_channels=[192] * 4, out_channels=256, num_outs=5),
)
