_base_ = './fcn_swin-nano_1xb4-240_demo.py'
# One rate for all, so that SGD can train what is added as well.
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='SGD', lr=0.02, momentum=0.9, weight_decay=1e-4),
    paramwise_cfg=dict(custom_keys={'backbone': dict(lr_mult=1)}),
)
