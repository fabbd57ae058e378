# Taps are the residual branches of blocks, before the skip connection is added.
_base_ = './fcn_efficientnet-lite0_1xb4-240_demo.py'
custom_imports = dict(imports=['e3va_mm'], allow_failed_imports=False)
model = dict(
    backbone=dict(
        _delete_=True,
        type='E3VABackbone',
        backbone={{_base_.model.backbone}},
        taps=[
            dict(taps=['model.blocks.1.1.drop_path'], dims=24),
            dict(taps=['model.blocks.2.1.drop_path'], dims=40),
            dict(taps=['model.blocks.4.1.drop_path', 'model.blocks.4.2.drop_path'], dims=112),
            dict(taps=[], dims=320),
        ],
    )
)
