# UPerNet with Swin-nano on CamVid; the leaf configs decide what of the backbone is trained.
_base_ = [
    '../models/upernet_swin-nano.py',
    '../datasets/camvid.py',
    '../schedules/small_sets.py',
    'mmseg::_base_/default_runtime.py',
    '../e3va_runtime.py',
]
model = dict(
    data_preprocessor=dict(size=(352, 480)),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)
optim_wrapper = dict(optimizer=dict(lr=1e-2))
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=300, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
