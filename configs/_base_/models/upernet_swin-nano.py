# UPerNet on the embedded Swin-nano, with heads as narrow as the backbone.
_base_ = 'mmseg::_base_/models/upernet_swin.py'
model = dict(
    data_preprocessor=dict(test_cfg=dict(size_divisor=32)),
    backbone=dict(
        embed_dims=48,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='e3va://swin_nano_tiny_imagenet.pth'),
    ),
    decode_head=dict(in_channels=[48, 96, 192, 384], channels=128),
    auxiliary_head=dict(in_channels=192, channels=64),
)
