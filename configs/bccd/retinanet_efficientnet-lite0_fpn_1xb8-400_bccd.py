_base_ = '../_base_/benchmarks/bccd_efficientnet-lite0.py'
# As high a rate as the head has would destroy pre-trained weights: the backbone gets a fifth of it.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.2)}))
