# RetinaNet with Swin-nano on BCCD; the leaf configs decide what of the backbone is trained.
_base_ = [
    '../models/retinanet_swin-nano.py',
    '../datasets/bccd.py',
    '../schedules/small_sets.py',
    'mmdet::_base_/default_runtime.py',
    '../e3va_runtime.py',
]
model = dict(bbox_head=dict(num_classes=3))
default_hooks = dict(
    logger=dict(interval=50, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=500, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
