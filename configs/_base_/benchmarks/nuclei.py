# Mask R-CNN with Swin-nano on the nuclei; the leaf configs decide what of the backbone is trained.
_base_ = [
    '../models/mask-rcnn_swin-nano.py',
    '../datasets/nuclei.py',
    '../schedules/small_sets.py',
    'mmdet::_base_/default_runtime.py',
    '../e3va_runtime.py',
]
model = dict(
    roi_head=dict(bbox_head=dict(num_classes=1), mask_head=dict(num_classes=1)),
    # Some images hold hundreds of nuclei.
    test_cfg=dict(rcnn=dict(max_per_img=300)),
)
default_hooks = dict(
    logger=dict(interval=50, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=500, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
