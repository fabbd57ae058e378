# ImageNet weights of ViT-Ti/16 (AugReg) in timm's key names; with pretrained=True instead, timm fetches them.
_base_ = './camvid.py'
model = dict(
    data_preprocessor=dict(mean=[127.5] * 3, std=[127.5] * 3),
    backbone=dict(
        _delete_=True,
        type='TIMMFeatures',
        model_name='vit_tiny_patch16_224',
        checkpoint='data/weights/vit_tiny_patch16_224.pth',
    ),
    neck=dict(type='SimpleFeaturePyramid', in_channels=[192] * 4, out_channels=96),
    decode_head=dict(in_channels=[96] * 4),
    auxiliary_head=dict(in_channels=96),
)
# Not chosen for this backbone; benchmarks/results/backbones.json has it.
optim_wrapper = dict(optimizer=dict(lr=3e-3))
