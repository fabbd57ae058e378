_base_ = './retinanet_swin-l-p4-w7_fpn_1x_voc0712.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='vit_large_patch16_dinov3.lvd1689m',
        pretrained=True,
        out_indices=(1, 2, 3),
    ),
    # Strides 8, 16 and 32, of the last three maps.
    neck=dict(
        _delete_=True,
        type='SimpleFeaturePyramid',
        in_channels=[1024] * 3,
        out_channels=256,
        scales=(2, 1, 0.5),
        num_outs=5,
    ),
)
