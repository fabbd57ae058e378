# The demo: which pixels are nuclei, and which are the border that keeps touching nuclei apart. A stock Swin (nano)
# with a head of one layer; `--tune e3va` or `--tune frozen` decides what of the backbone is trained.
_base_ = [
    'mmseg::_base_/default_runtime.py',
    '../configs/_base_/schedules/small_sets.py',
    '../configs/_base_/e3va_runtime.py',
]
data_root = 'work_dirs/demo/data'
crop_size = (192, 192)
metainfo = dict(classes=('ground', 'nucleus', 'border'), palette=[[0, 0, 0], [60, 200, 120], [240, 120, 40]])
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=crop_size,
        test_cfg=dict(size_divisor=32),
    ),
    backbone=dict(
        type='SwinTransformer',
        embed_dims=48,
        depths=[2, 2, 6, 2],
        num_heads=[3, 6, 12, 24],
        window_size=7,
        drop_path_rate=0.1,
        init_cfg=dict(type='Pretrained', checkpoint='e3va://swin_nano_tiny_imagenet.pth'),
    ),
    # One linear layer on the four maps: what it finds, the backbone has seen.
    decode_head=dict(
        type='FCNHead',
        num_convs=0,
        concat_input=False,
        input_transform='resize_concat',
        in_channels=[48, 96, 192, 384],
        in_index=[0, 1, 2, 3],
        channels=720,
        dropout_ratio=0.0,
        num_classes=3,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', class_weight=[1.0, 1.0, 2.0]),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
enlarge = dict(type='Resize', scale_factor=2.0, keep_ratio=True)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    enlarge,
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    enlarge,
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path='images/train', seg_map_path='labels/train'),
        pipeline=train_pipeline,
    ),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        metainfo=metainfo,
        data_root=data_root,
        data_prefix=dict(img_path='images/val', seg_map_path='labels/val'),
        pipeline=test_pipeline,
    ),
)
test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
# No validation while it trains: demo/run.py tests at the end, and keeps what is predicted.
val_cfg = None
max_iters = 240
train_cfg = dict(max_iters=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=20, end=max_iters, by_epoch=False),
]
optim_wrapper = dict(optimizer=dict(lr=3e-3))
default_hooks = dict(
    timer=dict(type='IterTimerHook'),
    logger=dict(type='LoggerHook', interval=2, log_metric_by_epoch=False),
    param_scheduler=dict(type='ParamSchedulerHook'),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=max_iters, max_keep_ckpts=1),
    sampler_seed=dict(type='DistSamplerSeedHook'),
    visualization=dict(type='SegVisualizationHook'),
)
randomness = dict(seed=0)
