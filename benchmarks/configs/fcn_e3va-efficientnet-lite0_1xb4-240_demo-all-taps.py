# Taps are the outputs of all blocks, also of those without a skip connection.
_base_ = './fcn_e3va-efficientnet-lite0_1xb4-240_demo-branch-taps.py'
model = dict(
    backbone=dict(
        taps=[
            dict(taps=['model.blocks.1.0', 'model.blocks.1.1'], dims=24),
            dict(taps=['model.blocks.2.0', 'model.blocks.2.1'], dims=40),
            dict(taps=['model.blocks.4.0', 'model.blocks.4.1', 'model.blocks.4.2'], dims=112),
            dict(taps=['model.blocks.6.0'], dims=320),
        ],
    )
)
