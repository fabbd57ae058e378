_base_ = '../_base_/benchmarks/bccd.py'
model = dict(
    backbone=dict(_delete_=True, type='TunedBackbone', backbone={{_base_.model.backbone}}, method=dict(type='Frozen'))
)
