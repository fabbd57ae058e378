_base_ = '../_base_/benchmarks/nuclei.py'
# The rate that suits new heads and adapters destroys pre-trained weights: the backbone gets a fifth of it.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.2)}))
