# RetinaNet with Swin-nano on BCCD; the leaf configs decide what of the backbone is trained.
_base_ = [
    '../models/retinanet_swin-nano.py',
    '../datasets/bccd.py',
    '../schedules/small_sets.py',
    'mmdet::_base_/default_runtime.py',
    '../e3va_runtime.py',
]
# Without norms in the head, some seeds do not train within the schedule: focal loss starts on a plateau.
model = dict(bbox_head=dict(num_classes=3, norm_cfg=dict(type='GN', num_groups=32)))
max_iters = 400
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=50, end=max_iters, by_epoch=False),
]
optim_wrapper = dict(optimizer=dict(lr=3e-4))
default_hooks = dict(
    logger=dict(interval=50, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=200, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
