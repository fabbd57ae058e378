_base_ = '../_base_/benchmarks/bccd.py'
# As high a rate as the head has would destroy pre-trained weights: the backbone gets a fifth of it.
optim_wrapper = dict(optimizer=dict(lr=1e-3), paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.2)}))
