_base_ = './retinanet_e3va-swin-nano_fpn_1xb8-400_bccd.py'
# The variant that was picked on held-out training images (docs/options.md).
model = dict(backbone=dict(adapter=dict(rank=4), mixer=dict(width=96), graph_stages=1))
# Highway and mixers learn best ten times as fast as the head.
optim_wrapper = dict(
    optimizer=dict(lr=1e-3),
    paramwise_cfg=dict(custom_keys=dict(highway=dict(lr_mult=10), mixers=dict(lr_mult=10))),
)
