_base_ = '../_base_/benchmarks/bccd_efficientnet-lite0.py'
model = dict(backbone=dict(_delete_=True, type='E3VABackbone', backbone={{_base_.model.backbone}}))
