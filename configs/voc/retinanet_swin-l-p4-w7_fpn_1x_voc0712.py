# 4 epochs of a data set repeated 3 times, as in the stock VOC configs.
_base_ = [
    '../_base_/models/retinanet_swin-l.py',
    'mmdet::_base_/datasets/voc0712.py',
    '../_base_/schedules/adamw_3x.py',
    'mmdet::_base_/default_runtime.py',
    '../_base_/e3va_runtime.py',
]
train_cfg = dict(max_epochs=4)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type='MultiStepLR', begin=0, end=4, by_epoch=True, milestones=[3], gamma=0.1),
]
