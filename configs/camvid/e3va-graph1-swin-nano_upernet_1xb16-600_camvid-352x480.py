_base_ = './e3va-swin-nano_upernet_1xb16-600_camvid-352x480.py'
# The variant that was picked on held-out training images (docs/options.md).
model = dict(backbone=dict(adapter=dict(rank=4), mixer=dict(width=96), graph_stages=1))
