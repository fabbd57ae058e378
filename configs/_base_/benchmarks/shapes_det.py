# For tests: RetinaNet with Swin-nano on the generated shapes.
_base_ = [
    '../models/retinanet_swin-nano.py',
    '../datasets/shapes_det.py',
    '../schedules/small_sets.py',
    'mmdet::_base_/default_runtime.py',
    '../e3va_runtime.py',
]
model = dict(
    neck=dict(out_channels=64),
    bbox_head=dict(num_classes=5, in_channels=64, feat_channels=64, stacked_convs=2),
)
max_iters = 800
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=30, end=max_iters, by_epoch=False),
]
# A high rate, because the schedule is short.
optim_wrapper = dict(optimizer=dict(lr=2e-3))
default_hooks = dict(
    logger=dict(interval=50, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=300, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
