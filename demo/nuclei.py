# The demo: which pixels are nuclei, and which are the border that keeps touching nuclei apart. A stock Swin (nano)
# with a head of one layer; `--tune e3va` or `--tune frozen` decides what of the backbone is trained.
_base_ = '../configs/_base_/benchmarks/camvid.py'
data_root = 'work_dirs/demo/data'
crop_size = (192, 192)
metainfo = dict(
    _delete_=True, classes=('ground', 'nucleus', 'border'), palette=[[0, 0, 0], [60, 200, 120], [240, 120, 40]]
)
model = dict(
    data_preprocessor=dict(size=crop_size),
    # One linear layer on the four maps: what it finds, the backbone has seen.
    decode_head=dict(
        _delete_=True,
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
    auxiliary_head=None,
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
in_process = dict(num_workers=0, persistent_workers=False)
nuclei = dict(metainfo=metainfo, data_root=data_root)
train_dataloader = dict(
    batch_size=4,
    dataset=dict(data_prefix=dict(seg_map_path='labels/train'), pipeline=train_pipeline, **nuclei),
    **in_process,
)
test_dataloader = dict(
    dataset=dict(data_prefix=dict(seg_map_path='labels/val'), pipeline=test_pipeline, **nuclei), **in_process
)
# No validation while it trains: demo/run.py tests at the end, and keeps what is predicted.
val_cfg = val_dataloader = val_evaluator = None
max_iters = 240
train_cfg = dict(max_iters=max_iters)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=20, end=max_iters, by_epoch=False),
]
# For full fine-tuning; what `--tune` adds to the backbone does not learn more slowly.
optim_wrapper = dict(optimizer=dict(lr=3e-3), paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}))
default_hooks = dict(logger=dict(interval=2), checkpoint=dict(interval=max_iters))
randomness = dict(seed=0)
