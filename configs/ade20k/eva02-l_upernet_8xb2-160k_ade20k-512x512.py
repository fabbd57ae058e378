_base_ = './dinov2-l_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(
    # As EVA-02 was trained.
    data_preprocessor=dict(mean=[122.771, 116.746, 104.094], std=[68.501, 66.632, 70.323]),
    backbone=dict(model_name='eva02_large_patch14_224.mim_m38m'),
)
