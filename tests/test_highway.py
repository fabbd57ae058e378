import pytest
import torch

from e3va_mm.highway import Recomputed, StageHighway, principal_components


def run(highway, taps):
    record = highway.record()
    for tap in taps:
        record.add(tap)
    return highway(record)


@pytest.mark.parametrize('dims', [48, 96, 128])
def test_parameters_of_an_adapter(dims):
    highway = StageHighway(num_adapters=4, embed_dims=dims)
    assert sum(parameter.numel() for parameter in highway.parameters()) == 4 * (49.5 * dims + 128)


def test_zero_initialisation_is_silent_and_kaiming_is_not():
    taps = [torch.randn(2, 3, 16) for _ in range(2)]
    assert not run(StageHighway(2, 16), taps).any()
    assert run(StageHighway(2, 16, init='kaiming'), taps).any()


def test_every_factor_moves_within_two_steps():
    torch.manual_seed(0)
    highway = StageHighway(2, 16)
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
        (dict(mixing=4), 'adapter.mixing must be 0 or an odd integer, got 4'),
        (dict(basis='pac'), r"adapter.basis must be one of \('learned', 'pca'\), got 'pac'"),
        (dict(basis='pca', rank=9), r"basis='pca' finds 16 components, not rank \* branches = 18"),
        (dict(init='ones'), r"init must be one of \('zero', 'kaiming'\), got 'ones'"),
    ],
)
def test_options_outside_their_range(options, message):
    with pytest.raises(ValueError, match=message):
        StageHighway(2, 16, **options)


def test_wrong_number_of_taps():
    with pytest.raises(ValueError, match='2 adapters but was given 1 taps'):
        run(StageHighway(2, 16), [torch.zeros(1, 3, 16)])


def test_principal_components_whiten_the_leading_directions():
    torch.manual_seed(0)
    tokens = torch.randn(5000, 6) @ torch.diag(torch.tensor([9.0, 5, 3, 0.1, 0.1, 0])) @ torch.randn(6, 6) + 4
    reduced = tokens @ principal_components(tokens, 3)
    torch.testing.assert_close(reduced.T.cov(), torch.eye(3), rtol=0, atol=0.02)
    residual = tokens - tokens.mean(0)
    fitted = torch.linalg.lstsq(reduced - reduced.mean(0), residual).solution
    explained = 1 - (residual - (reduced - reduced.mean(0)) @ fitted).square().sum() / residual.square().sum()
    assert explained > 0.99


def test_a_pca_basis_is_fitted_once_and_kept_in_the_state_dict():
    torch.manual_seed(0)
    highway = StageHighway(2, 16, rank=2, basis='pca')
    taps = [torch.randn(2, 30, 16) for _ in range(2)]
    assert highway.needs_basis() and not highway.down_in.requires_grad
    visit = highway.fit_basis()
    for tap in taps:
        visit(tap)
    assert not highway.needs_basis()
    clone = StageHighway(2, 16, rank=2, basis='pca')
    clone.load_state_dict(highway.state_dict())
    assert not clone.needs_basis()
    assert torch.equal(clone.down_in, highway.down_in)


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
