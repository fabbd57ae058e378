# The demo, validated: small enough for a CPU.
_base_ = '../../demo/nuclei.py'
data_root = 'work_dirs/demo/data'
val_dataloader = dict(
    _delete_=True,
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='BaseSegDataset',
        data_root=data_root,
        metainfo={{_base_.metainfo}},
        img_suffix='.jpg',
        seg_map_suffix='.png',
        data_prefix=dict(img_path='images/val', seg_map_path='labels/val'),
        pipeline={{_base_.test_pipeline}},
    ),
)
val_cfg = dict(_delete_=True, type='ValLoop')
val_evaluator = dict(_delete_=True, type='IoUMetric', iou_metrics=['mIoU'])
train_cfg = dict(val_interval=240)
