"""The mixers of the highway's state."""

import pytest
import torch
from conftest import e3va, images, saved_bytes, stir, swin
from mmengine.registry import MODELS

from e3va_mm.highway import highway as highway_module
from e3va_mm.highway.mixer import StateMixer


def test_equals_its_definition_a_channel_at_a_time():
    torch.manual_seed(0)
    mixer, state = stir(StateMixer(6, width=2, kernel_sizes=(1, 3))).double(), torch.randn(1, 20, 6).double()
    reduced = mixer.down(mixer.norm(state))
    image = reduced.transpose(1, 2).reshape(2, 4, 5)
    mixed = torch.zeros_like(image)
    for conv in mixer.filter.convs:
        for channel in range(2):
            padded = torch.nn.functional.pad(image[channel], [conv.padding[0]] * 4)
            size = conv.kernel_size[0]
            windows = padded.unfold(0, size, 1).unfold(1, size, 1)
            mixed[channel] += ((windows * conv.weight[channel, 0]).sum((-2, -1)) + conv.bias[channel]) / 2
    active = torch.nn.functional.gelu(reduced + mixed.flatten(1).t())
    torch.testing.assert_close(mixer(state, (4, 5)), state + mixer.up(active))


@pytest.mark.parametrize('size', [(64, 64), (37, 91), (1, 5)])
def test_starts_silent(size):
    model = e3va(mixer=dict(width=8))
    with torch.no_grad():
        expected = model.backbone(images(size))
    for output, stock in zip(model(images(size)), expected):
        torch.testing.assert_close(output, stock, rtol=0, atol=1e-5)


def test_mixed_state_goes_on_to_the_next_stage():
    """What the mixer of stage 0 adds shows in all outputs."""
    model = stir(e3va(mixer=dict(width=8)))
    before = model(images())
    with torch.no_grad():
        model.mixers[0][-1].up.bias.add_(1)
    assert all(not torch.allclose(one, other) for one, other in zip(before, model(images())))


def test_gradients_are_those_of_plain_autograd(monkeypatch):
    model = stir(e3va(mixer=dict(width=4))).double()

    def gradients():
        model.zero_grad()
        sum(output.square().mean() for output in model(images().double())).backward()
        return [parameter.grad for parameter in model.adapter_parameters().values()]

    fast = gradients()
    monkeypatch.setattr(highway_module, 'recomputed', lambda function, limit, state, *parameters: function(state))
    for one, other in zip(fast, gradients()):
        torch.testing.assert_close(one, other)


def test_keeps_no_activations_for_the_backward_pass():
    """Its kernels of one size are kept, whatever the images: nothing that grows with them."""
    models = [e3va(**option) for option in ({}, dict(mixer=dict()))]
    for model in models:
        model(images())  # the first pass keeps what it compares
    plain, mixed = ([saved_bytes(model, images(size)) for size in ((64, 64), (128, 96))] for model in models)
    assert mixed[0] - plain[0] == mixed[1] - plain[1] < 100_000


def test_is_the_same_in_half_precision():
    """Under autocast, which casts the weights of all mixers at once; the norm stays in fp32."""
    torch.manual_seed(0)
    model = stir(e3va(mixer=dict(width=8)))

    def outputs_and_gradients():
        model.zero_grad()
        outputs = model(images())
        sum(output.float().square().mean() for output in outputs).backward()
        return [*outputs, *(parameter.grad for parameter in model.mixers.parameters())]

    exact = outputs_and_gradients()
    with torch.autocast('cpu', torch.bfloat16):
        half = outputs_and_gradients()
    for one, other in zip(exact, half):
        assert (one - other).norm() < 0.05 * one.norm()


@pytest.mark.parametrize(
    ('options', 'number'),
    [
        (dict(mixer=dict()), 1_337_088),
        (dict(mixer=dict(width=96)), 1_605_120),
        (dict(adapter=dict(rank=4), mixer=dict(width=96)), 1_022_976),
        (dict(adapter=dict(rank=4), mixer=dict(width=96), graph_stages=1), 1_126_432),
    ],
    ids=['defaults', '96', 'rank 4, 96', 'rank 4, 96, in graph'],
)
def test_parameter_count(options, number):
    """Less than 2 % of Swin-B's 86.75 M; a mixer of width w has (2 w + 3) C + 87 w."""
    backbone = swin(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    model = MODELS.build(dict(type='E3VABackbone', backbone=backbone, **options))
    assert sum(parameter.numel() for parameter in model.adapter_parameters().values()) == number < 0.02 * 86.75e6
