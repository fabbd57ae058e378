# Mask2Former on the nuclei.
_base_ = [
    '../models/mask2former_small.py',
    '../datasets/nuclei.py',
    '../schedules/small_sets.py',
    'mmdet::_base_/default_runtime.py',
    '../e3va_runtime.py',
]
max_iters = 400
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=50, end=max_iters, by_epoch=False),
]
optim_wrapper = dict(
    optimizer=dict(lr=3e-4),
    # As high a rate as the head has would destroy pre-trained weights: the backbone gets a fifth of it.
    paramwise_cfg=dict(
        custom_keys={
            'backbone': dict(lr_mult=0.2),
            'query_embed': dict(decay_mult=0.0),
            'query_feat': dict(decay_mult=0.0),
            'level_embed': dict(decay_mult=0.0),
        }
    ),
    clip_grad=dict(max_norm=0.1),
)
default_hooks = dict(
    logger=dict(interval=50, log_metric_by_epoch=False),
    checkpoint=dict(by_epoch=False, interval=200, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
