"""Subclasses and plugins: they run as they are, or the first pass refuses them by name."""

import pytest
import torch
from conftest import e3va, images, swin, timm_features
from mmengine.registry import MODELS
from torch.testing import assert_close


def a_block_of_its_own(backbone):
    stock = type(backbone.stages[1].blocks[0])

    class Halved(stock):
        def forward(self, x, hw_shape):
            return x + 0.5 * (super().forward(x, hw_shape) - x)

    backbone.stages[1].blocks[0].__class__ = Halved


def attention_of_its_own(backbone):
    attention = backbone.stages[0].blocks[1].attn

    class Doubled(type(attention)):
        def forward(self, query, hw_shape):
            return 2 * super().forward(query, hw_shape)

    attention.__class__ = Doubled


def merging_of_its_own(backbone):
    merging = backbone.stages[0].downsample

    class Shifted(type(merging)):
        def forward(self, x, input_size):
            tokens, size = super().forward(x, input_size)
            return tokens + 1, size

    merging.__class__ = Shifted


def a_forward_of_its_own(backbone):
    class Offset(type(backbone)):
        def forward(self, images):
            return super().forward(images + 0.5)

    backbone.__class__ = Offset


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
@pytest.mark.parametrize('change', [a_block_of_its_own, attention_of_its_own, merging_of_its_own, a_forward_of_its_own])
@pytest.mark.parametrize('graph_stages', [0, 3])
def test_subclasses_of_swin_run_as_they_are(scope, change, graph_stages):
    """A forward that is overridden, of the backbone or of a module in it, counts."""
    stock = MODELS.build(swin(scope))
    change(stock)
    model = e3va(stock, mixer=dict(width=4), graph_stages=graph_stages)
    with torch.no_grad():
        expected = model.backbone(images())
    for _ in range(2):
        assert_close(list(model(images())), list(expected), rtol=1e-5, atol=1e-5)


class WithPlugin(torch.nn.Module):
    """A module between the stages and the output norm."""

    def __init__(self, norm):
        super().__init__()
        self.norm, self.plugin = norm, torch.nn.Linear(24, 24)

    def forward(self, tokens):
        return self.norm(self.plugin(tokens))


def plugin_behind_a_stage(backbone):
    plugin = torch.nn.Linear(24, 24)
    backbone.stages[1].register_forward_hook(lambda stage, args, output: (*output[:2], plugin(output[2]), output[3]))


def plugin_in_the_maps(backbone):
    class Scaled(type(backbone)):
        def forward(self, images):
            first, second, *others = super().forward(images)
            return first, 2 * second, *others

    backbone.__class__ = Scaled


def one_map_less(backbone):
    class Three(type(backbone)):
        def forward(self, images):
            return super().forward(images)[1:]

    backbone.__class__ = Three


@pytest.mark.parametrize('scope', ['mmseg', 'mmdet'])
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            plugin_behind_a_stage,
            "stage 1 of this SwinTransformer: values at 'stages.1.blocks.1', behind the norm, differ",
        ),
        (plugin_in_the_maps, 'stage 1 of this Scaled: values'),
        (one_map_less, 'stage 3 of this Three: it returns 3 maps, not 4'),
    ],
)
def test_what_the_highway_would_miss_is_refused(scope, change, message):
    stock = MODELS.build(swin(scope))
    change(stock)
    model = e3va(stock)
    for _ in range(2):  # and not only once
        with pytest.raises(ValueError, match=message):
            model(images())


def test_a_plugin_inside_of_the_output_norm():
    """What the norm's place does is its own business: it is trained there, and the output starts as the backbone's."""
    stock = MODELS.build(swin())
    stock.norm1 = WithPlugin(stock.norm1)
    model = e3va(stock)
    with torch.no_grad():
        expected = model.backbone(images())
    assert_close(list(model(images())), list(expected), rtol=1e-5, atol=1e-5)


def test_a_block_without_the_taps_of_its_family():
    stock = MODELS.build(swin())
    stock.stages[2].blocks[1].ffn = torch.nn.Identity()
    with pytest.raises(TypeError, match='stages.2.blocks.1 is a SwinBlock without attn and ffn.layers'):
        e3va(stock)


def test_subclasses_of_timm_features():
    stock = type(MODELS.build(timm_features()))

    class Brightened(stock):
        def forward(self, images):
            return super().forward(images + 0.5)

    class Doubled(stock):
        def forward(self, images):
            return tuple(2 * output for output in super().forward(images))

    options = {key: value for key, value in timm_features().items() if key != 'type'}
    model = e3va(Brightened(**options))
    with torch.no_grad():
        expected = model.backbone(images())
    assert_close(list(model(images())), list(expected), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match='stage 0 of this Doubled'):
        e3va(Doubled(**options))(images())
