import pytest
import torch

from e3va_mm.highway.recomputed import Recomputed
from e3va_mm.highway.stage_adapters import StageAdapters


def run(highway, taps):
    record = highway.record()
    for tap in taps:
        record.add(tap)
    return highway(record)


@pytest.mark.parametrize('dims', [48, 96, 128])
def test_parameters_of_an_adapter(dims):
    highway = StageAdapters(num_adapters=4, embed_dims=dims)
    assert sum(parameter.numel() for parameter in highway.parameters()) == 4 * (49.5 * dims + 128)


def test_zero_initialisation_is_silent_and_kaiming_is_not():
    taps = [torch.randn(2, 3, 16) for _ in range(2)]
    assert not run(StageAdapters(2, 16), taps).any()
    assert run(StageAdapters(2, 16, init='kaiming'), taps).any()


def test_every_factor_moves_within_two_steps():
    torch.manual_seed(0)
    highway = StageAdapters(2, 16)
    start = {name: parameter.detach().clone() for name, parameter in highway.named_parameters()}
    optimizer = torch.optim.SGD(highway.parameters(), lr=0.1)
    taps = [torch.randn(2, 3, 16) for _ in range(2)]
    for _ in range(2):
        optimizer.zero_grad()
        (run(highway, taps) - 1).square().mean().backward()
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
        (dict(hidden_ratio=float('inf')), 'adapter.hidden_ratio must be a number above 0, got inf'),
        (dict(init='ones'), r"init must be one of \['zero', 'kaiming'\], got 'ones'"),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        StageAdapters(2, 16, **options)


def test_wrong_number_of_taps():
    with pytest.raises(ValueError, match='2 adapters but was given 1 taps'):
        run(StageAdapters(2, 16), [torch.zeros(1, 3, 16)])


@pytest.mark.parametrize(('limit', 'error'), [(None, 0), (torch.bfloat16, 0.02)])
def test_recomputed_function(limit, error):
    torch.manual_seed(0)
    norm = torch.nn.LayerNorm(8)
    kept = []

    def function(state):
        return norm(state), state.square().flatten(1)

    def gradients(outputs, state):
        return torch.autograd.grad(outputs[0].sin().sum() + outputs[1].sum(), (state, *norm.parameters()))

    state = torch.randn(3, 5, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        outputs = Recomputed.apply(function, limit, state, *norm.parameters())
    assert sum(tensor.nbytes for tensor in kept) == state.numel() * (limit or state.dtype).itemsize + 2 * 8 * 4
    plain = function(state)
    assert all(torch.equal(output, expected) for output, expected in zip(outputs, plain))
    for gradient, expected in zip(gradients(outputs, state), gradients(plain, state)):
        assert (gradient - expected).norm() <= max(error, 1e-6) * expected.norm()
