_base_ = './dinov2-l_upernet_8xb2-160k_ade20k-512x512.py'
model = dict(backbone=dict(model_name='vit_large_patch16_dinov3.lvd1689m'))
