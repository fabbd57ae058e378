"""The mixers of the highway's state."""

import pytest
import torch
from conftest import ROOT, e3va, images, saved_bytes, stir, swin
from mmengine.registry import MODELS

from e3va_mm.backbones import e3va as e3va_module
from e3va_mm.mixer import KeptMix, StateMixer, mix, mixer_weights


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
    model = e3va(mixer=dict(width=8, depth=2))
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


@pytest.mark.parametrize('recompute', [True, False])
def test_gradients_are_those_of_plain_autograd(recompute, monkeypatch):
    model = stir(e3va(mixer=dict(width=4, depth=2, recompute=recompute))).double()

    def gradients():
        model.zero_grad()
        sum(output.square().mean() for output in model(images().double())).backward()
        return [parameter.grad for parameter in model.adapter_parameters().values()]

    fast = gradients()
    model.recompute_mixers = True
    monkeypatch.setattr(e3va_module.Recomputed, 'apply', lambda function, limit, state, *parameters: function(state))
    for one, other in zip(fast, gradients()):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_kept_mixers_are_the_same(dtype):
    """Outputs and all gradients; in half precision, the weights and the bottleneck are, the state is not."""
    torch.manual_seed(0)
    mixer, state = stir(StateMixer(5, width=3)), torch.randn(2, 12, 5)
    if dtype == torch.float64:
        mixer, state = mixer.double(), state.double()

    def results(function):
        mixer.zero_grad()
        leaf = state.clone().requires_grad_()
        with torch.autocast('cpu', dtype, enabled=dtype == torch.bfloat16):
            (weights,) = mixer_weights([mixer])
            output = function(leaf, weights)
        output.square().sum().backward()
        return [output, leaf.grad, *(parameter.grad for parameter in mixer.parameters())]

    plain = results(lambda leaf, weights: mix(leaf, (3, 4), weights))
    kept = results(lambda leaf, weights: KeptMix.apply(leaf, (3, 4), *weights))
    for one, other in zip(plain, kept):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one - other).norm() <= (1e-9 if dtype == torch.float64 else 0.02) * one.norm()


def test_what_mixers_keep_for_the_backward_pass():
    """By default, kernels of one size, whatever the images; else what comes out of norms and convolutions."""
    width, sizes = 8, ((64, 64), (128, 96))
    added = [2 * (128 * 96 - 64 * 64) // stride**2 for stride in (4, 8, 16, 32)]  # tokens of two images

    def growth(**options):
        small, large = (saved_bytes(e3va(**options), images(size)) for size in sizes)
        return large - small

    plain, dims = growth(), e3va().taps.embed_dims
    assert growth(feedback=True) == growth(mixer=dict()) == growth(mixer=dict(depth=2), feedback=True) == plain
    # Values of fp32 a token; two more are the norm's moments.
    kept = sum(4 * tokens * (C + width + 2) for tokens, C in zip(added, dims))
    assert growth(mixer=dict(width=width, recompute=False)) == plain + kept


def test_is_the_same_in_half_precision():
    """Under autocast, which casts the weights of all mixers at once; the norm stays in fp32."""
    torch.manual_seed(0)
    model = stir(e3va(mixer=dict(width=8, depth=2)))

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
        (dict(mixer=dict(width=48, depth=2)), 1_610_880),
        (dict(mixer=dict(width=96)), 1_605_120),
        (dict(adapter=dict(rank=4), mixer=dict(width=96)), 1_022_976),
        (dict(adapter=dict(rank=4), mixer=dict(width=96, every=6)), 1_239_360),
        (dict(adapter=dict(rank=4), mixer=dict(width=96), graph_stages=1), 1_126_432),
    ],
    ids=['defaults', '48x2', '96', 'rank 4, 96', 'rank 4, 96, every 6', 'rank 4, 96, in graph'],
)
def test_parameter_count(options, number):
    """Less than 2 % of Swin-B's 86.75 M; a mixer of width w has (2 w + 3) C + 87 w."""
    backbone = swin(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32))
    model = MODELS.build(dict(type='E3VABackbone', backbone=backbone, **options))
    assert sum(parameter.numel() for parameter in model.adapter_parameters().values()) == number < 0.02 * 86.75e6
    assert f'| {number:,} |' in (ROOT / 'docs/methods.md').read_text()
