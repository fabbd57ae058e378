_base_ = './fcn_swin-nano_1xb4-240_demo.py'
model = dict(
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='tf_efficientnet_lite0',
        checkpoint='data/weights/efficientnet-lite0-57934424.pth',
    ),
    decode_head=dict(in_channels=[24, 40, 112, 320], channels=496),
)
