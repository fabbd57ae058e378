_base_ = './fcn_swin-nano_1xb4-240_demo.py'
model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='vit_tiny_patch16_224',
        checkpoint='data/weights/vit_tiny_patch16_224.pth',
    ),
    neck=dict(type='SimpleFeaturePyramid', in_channels=[192] * 4, out_channels=96),
    decode_head=dict(in_channels=[96] * 4, channels=384),
    # A plain ViT predicts badly at another size than it was trained at.
    test_cfg=dict(mode='slide', crop_size=(192, 192), stride=(128, 128)),
)
