# BCCD blood cells, 640 x 480, 3 classes: data/bccd/VOC2007 in VOC's layout. Loaders and flips are those of the nuclei.
_base_ = './nuclei.py'
data_root = 'data/bccd'
metainfo = dict(
    _delete_=True, classes=('RBC', 'WBC', 'Platelets'), palette=[(220, 20, 60), (60, 60, 220), (60, 180, 75)]
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=(640, 480), ratio_range=(0.75, 1.25), keep_ratio=True),
    dict(type='RandomFlip', prob=0.5, direction=['horizontal', 'vertical']),
    # Some boxes of the set are a line, and their regression target is infinite.
    dict(type='FilterAnnotations', min_gt_bbox_wh=(2, 2)),
    dict(type='PackDetInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(640, 480), keep_ratio=True),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')),
]
train_dataloader = dict(
    dataset=dict(
        type='XMLDataset',
        metainfo=metainfo,
        data_root=data_root,
        ann_file='VOC2007/ImageSets/Main/train.txt',
        data_prefix=dict(_delete_=True, sub_data_root='VOC2007/'),
        pipeline=train_pipeline,
    )
)
val_dataloader = dict(
    dataset=dict(
        type='XMLDataset',
        metainfo=metainfo,
        data_root=data_root,
        ann_file='VOC2007/ImageSets/Main/val.txt',
        data_prefix=dict(_delete_=True, sub_data_root='VOC2007/'),
        pipeline=test_pipeline,
    )
)
test_dataloader = val_dataloader
# Averaged over IoU 0.50 to 0.95: at 0.50 alone these cells are easy.
iou_thresholds = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]
val_evaluator = dict(_delete_=True, type='VOCMetric', metric='mAP', eval_mode='area', iou_thrs=iou_thresholds)
test_evaluator = val_evaluator
