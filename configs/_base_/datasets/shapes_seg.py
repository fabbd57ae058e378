# The generated shapes as semantic segmentation; `python benchmarks/shapes.py data/shapes` writes them.
_base_ = './camvid.py'
data_root = 'data/shapes'
metainfo = dict(
    _delete_=True,
    classes=('ground', 'circle', 'square', 'triangle', 'cross', 'star'),
    palette=[
        [40, 40, 40], [230, 60, 60], [60, 180, 75], [70, 110, 230], [240, 190, 40], [160, 60, 190],
    ],
)  # fmt: skip
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(96, 96), keep_ratio=True),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        metainfo=metainfo,
        data_root=data_root,
        img_suffix='.png',
        data_prefix=dict(seg_map_path='masks/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(
        metainfo=metainfo,
        data_root=data_root,
        img_suffix='.png',
        data_prefix=dict(seg_map_path='masks/val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
