_base_ = './dinov3-7b_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(backbone=dict(_delete_=True, type='E3VABackbone', backbone={{_base_.model.backbone}}))
