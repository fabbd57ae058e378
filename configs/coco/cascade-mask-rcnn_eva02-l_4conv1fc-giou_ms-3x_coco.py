_base_ = './cascade-mask-rcnn_swin-l-p4-w7_fpn_4conv1fc-giou_ms-3x_coco.py'
model = dict(
    # As EVA-02 was trained.
    data_preprocessor=dict(mean=[122.771, 116.746, 104.094], std=[68.501, 66.632, 70.323]),
    backbone=dict(_delete_=True, type='TIMMFeatures', model_name='eva02_large_patch14_224.mim_m38m', pretrained=True),
    neck=dict(_delete_=True, type='SimpleFeaturePyramid', in_channels=[1024] * 4, out_channels=256, num_outs=5),
)
