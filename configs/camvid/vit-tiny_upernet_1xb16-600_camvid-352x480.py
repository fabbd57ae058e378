_base_ = '../_base_/benchmarks/camvid_vit-tiny.py'
# The rate that suits new heads and adapters destroys pre-trained weights: the backbone gets a tenth of it.
optim_wrapper = dict(paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=0.1)}))
