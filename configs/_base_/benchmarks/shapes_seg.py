# For tests: UPerNet with Swin-nano on the generated shapes.
_base_ = [
    '../models/upernet_swin-nano.py',
    '../datasets/shapes_seg.py',
    '../schedules/small_sets.py',
    'mmseg::_base_/default_runtime.py',
    '../e3va_runtime.py',
]
model = dict(
    data_preprocessor=dict(size=(96, 96)),
    decode_head=dict(num_classes=6, channels=64),
    auxiliary_head=dict(num_classes=6, channels=32),
)
max_iters = 600
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=30, end=max_iters, by_epoch=False),
]
# A high rate, because the schedule is short.
optim_wrapper = dict(optimizer=dict(lr=3e-3))
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=300, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
