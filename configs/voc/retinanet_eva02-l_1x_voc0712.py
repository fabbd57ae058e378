_base_ = './retinanet_swin-l-p4-w7_fpn_1x_voc0712.py'
model = dict(
    # As EVA-02 was trained.
    data_preprocessor=dict(mean=[122.771, 116.746, 104.094], std=[68.501, 66.632, 70.323]),
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='eva02_large_patch14_224.mim_m38m',
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
