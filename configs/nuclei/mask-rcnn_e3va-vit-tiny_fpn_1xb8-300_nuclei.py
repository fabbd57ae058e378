_base_ = '../_base_/benchmarks/nuclei_vit-tiny.py'
model = dict(backbone=dict(_delete_=True, type='E3VABackbone', backbone={{_base_.model.backbone}}))
