import pytest
import torch

from e3va_mm.highway import StageHighway


@pytest.mark.parametrize('dims', [48, 96, 128])
def test_parameters_of_an_adapter(dims):
    highway = StageHighway(num_adapters=4, embed_dims=dims)
    assert sum(parameter.numel() for parameter in highway.parameters()) == 4 * (49.5 * dims + 128)


def test_zero_initialisation_is_silent_and_kaiming_is_not():
    taps = [torch.randn(2, 3, 16) for _ in range(2)]
    assert not StageHighway(2, 16)(taps).any()
    assert StageHighway(2, 16, init='kaiming')(taps).any()


def test_every_factor_moves_within_two_steps():
    torch.manual_seed(0)
    highway = StageHighway(2, 16)
    start = {name: parameter.detach().clone() for name, parameter in highway.named_parameters()}
    optimizer = torch.optim.SGD(highway.parameters(), lr=0.1)
    taps = [torch.randn(2, 3, 16) for _ in range(2)]
    for _ in range(2):
        optimizer.zero_grad()
        (highway(taps) - 1).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(start[name], parameter) for name, parameter in highway.named_parameters())


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(rank=0), 'adapter.rank must be an integer of at least 1, got 0'),
        (dict(rank=-4), 'got -4'),
        (dict(rank=2.5), 'got 2.5'),
        (dict(branches=0), 'adapter.branches'),
        (dict(hidden_ratio=0), 'adapter.hidden_ratio'),
        (dict(init='ones'), r"init must be one of \('zero', 'kaiming'\), got 'ones'"),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        StageHighway(2, 16, **options)


def test_wrong_number_of_taps():
    with pytest.raises(ValueError, match='2 adapters but was given 1 taps'):
        StageHighway(2, 16)([torch.zeros(1, 3, 16)])
