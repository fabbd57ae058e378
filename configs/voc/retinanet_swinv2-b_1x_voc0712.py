_base_ = './retinanet_swin-l-p4-w7_fpn_1x_voc0712.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='swinv2_base_window12_192.ms_in22k',
        pretrained=True,
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[256, 512, 1024]),
)
