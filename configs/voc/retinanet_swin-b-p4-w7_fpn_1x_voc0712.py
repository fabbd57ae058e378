_base_ = './retinanet_swin-l-p4-w7_fpn_1x_voc0712.py'
model = dict(
    backbone=dict(
        embed_dims=128,
        depths=[2, 2, 18, 2],
        num_heads=[4, 8, 16, 32],
        drop_path_rate=0.3,
        init_cfg=dict(
            type='Pretrained',
            checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224_22k.pth',
        ),
    ),
    neck=dict(in_channels=[256, 512, 1024]),
)
