_base_ = '../_base_/benchmarks/bccd_faster-rcnn.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='tf_efficientnet_lite0',
        checkpoint='data/weights/efficientnet-lite0-57934424.pth',
    ),
    neck=dict(in_channels=[24, 40, 112, 320]),
)
