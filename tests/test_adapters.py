import pytest
import torch
from conftest import reference_delta
from torch.utils.flop_counter import FlopCounterMode

from e3va_mm.highway import adapters, tap_record
from e3va_mm.highway.adapters import AdapterWeights, BottleneckWeights, stage_delta
from e3va_mm.highway.tap_record import TapRecord, TapStorage, decompress


def make_weights(num=3, dims=6, branches=2, rank=2, hidden=4, dtype=torch.float64) -> AdapterWeights:
    width = branches * rank
    shapes = [
        (num, dims, width),
        (num, branches, rank, rank),
        (num, width, hidden),
        (num, hidden),
        (num, hidden, width),
        (num, width, dims),
        (num, dims),
    ]
    torch.manual_seed(0)
    return pack(*(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes))


def pack(down_in, *bottleneck):
    return AdapterWeights(down_in, BottleneckWeights(*bottleneck))


def flat(weights):
    return weights.down_in, *weights.bottleneck


def make_taps(num=3, shape=(2, 5, 6), dtype=torch.float64):
    torch.manual_seed(1)
    return [torch.randn(shape, dtype=dtype) for _ in range(num)]


def fast_delta(taps, weights, **storage):
    record = TapRecord(weights.down_in, TapStorage(**storage))
    for tap in taps:
        record.add(tap)
    return stage_delta(record, weights)


def gradients(delta, weights):
    torch.manual_seed(2)
    return torch.autograd.grad((delta * torch.randn_like(delta)).sum(), flat(weights))


@pytest.fixture(params=[1, 10**9], ids=['one adapter a group', 'one group'])
def group_bytes(request, monkeypatch):
    monkeypatch.setattr(adapters, '_GROUP_BYTES', request.param)


def test_gradcheck(group_bytes):
    taps = make_taps()
    assert torch.autograd.gradcheck(lambda *fields: fast_delta(taps, pack(*fields)), flat(make_weights()))


def test_equals_plain_autograd(group_bytes):
    taps, weights = make_taps(), make_weights()
    fast, plain = fast_delta(taps, weights), reference_delta(taps, weights)
    torch.testing.assert_close(fast, plain)
    torch.testing.assert_close(gradients(fast, weights), gradients(plain, weights))


@pytest.mark.parametrize('num_tokens', [3000, 2999])
def test_sums_over_many_tokens(num_tokens):
    taps, weights = make_taps(shape=(1, num_tokens, 6)), make_weights()
    expected = gradients(reference_delta(taps, weights), weights)
    torch.testing.assert_close(gradients(fast_delta(taps, weights), weights), expected)


def test_non_contiguous_taps():
    weights = make_weights()
    taps = [tap.transpose(0, 1) for tap in make_taps(shape=(5, 2, 6))]
    torch.testing.assert_close(fast_delta(taps, weights), reference_delta(taps, weights))


def test_no_tokens():
    weights = make_weights()
    delta = fast_delta(make_taps(shape=(0, 5, 6)), weights)
    assert delta.shape == (0, 5, 6)
    assert all(not gradient.any() for gradient in gradients(delta, weights))


def test_products_run_in_the_dtype_of_the_taps():
    weights = make_weights(dtype=torch.float32)
    taps = make_taps(dtype=torch.bfloat16)
    delta = fast_delta(taps, weights)
    assert delta.dtype == torch.bfloat16
    assert {gradient.dtype for gradient in gradients(delta, weights)} == {torch.float32}
    exact = reference_delta([tap.float() for tap in taps], weights)
    assert (delta - exact).norm() < 0.02 * exact.norm()


def test_autocast_leaves_full_precision_taps_alone():
    weights, taps = make_weights(dtype=torch.float32), make_taps(dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        delta = fast_delta(taps, weights)
    torch.testing.assert_close(delta, reference_delta(taps, weights))


@pytest.mark.parametrize(('dtype', 'error'), [(torch.bfloat16, 2e-3), (torch.float8_e4m3fn, 4e-2)])
def test_saved_dtype_touches_one_gradient_only(dtype, error):
    weights, taps = make_weights(dtype=torch.float32), make_taps(shape=(4, 50, 6), dtype=torch.float32)
    exact, saved = fast_delta(taps, weights), fast_delta(taps, weights, dtype=dtype)
    assert torch.equal(exact, saved)
    (exact_down_in, *exact_rest), (down_in, *rest) = gradients(exact, weights), gradients(saved, weights)
    torch.testing.assert_close(rest, exact_rest)
    relative = (down_in - exact_down_in).norm() / exact_down_in.norm()
    assert 0 < relative < error


@pytest.mark.parametrize('value', [0.0, 1e-30, 1e30])
def test_float8_of_zeros_and_extremes(value):
    tap = torch.tensor([[value, -value, value / 3, 0.0]])
    record = TapRecord(torch.ones(1, 4, 2, requires_grad=True), TapStorage(dtype=torch.float8_e4m3fn))
    record.add(tap)
    kept = decompress(record.kept[0], record.scales[0], torch.float32)
    torch.testing.assert_close(kept, tap, rtol=0.07, atol=0)


def test_backward_flops_are_those_of_the_highway():
    num, dims, width, hidden, tokens = 3, 6, 4, 4, 10
    weights, taps = make_weights(dtype=torch.float32), make_taps(dtype=torch.float32)
    delta = fast_delta(taps, weights)
    with FlopCounterMode(display=False) as counter:
        delta.sum().backward()
    core = width * width
    recomputed = 2 * core + 2 * width * hidden
    to_inputs = 2 * core + 2 * width * hidden + width * dims
    to_weights = 2 * core + 2 * width * hidden + 2 * width * dims
    assert counter.get_total_flops() == 2 * num * tokens * (recomputed + to_inputs + to_weights)


def test_keeps_taps_and_their_rank_space_only():
    weights = make_weights(dtype=torch.float32)
    for dtype, bytes_per_value in ((None, 4), (torch.bfloat16, 2), (torch.float8_e4m3fn, 1)):
        kept = []
        owned = {weight.data_ptr() for weight in flat(weights)}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor
        ):
            fast_delta(make_taps(dtype=torch.float32), weights, dtype=dtype)
        sizes = sorted(tensor.nbytes for tensor in kept if tensor.data_ptr() not in owned)
        scales = [3 * 4] if dtype == torch.float8_e4m3fn else []
        assert sizes == sorted([3 * 10 * 6 * bytes_per_value, 3 * 10 * 4 * 4, *scales])


def test_sampled_tokens_give_an_unbiased_gradient(monkeypatch):
    monkeypatch.setattr(tap_record, '_FEWEST_TOKENS', 4)
    weights, taps = make_weights(), make_taps(shape=(2, 20, 6))
    exact_down_in, *exact_rest = gradients(fast_delta(taps, weights), weights)
    deltas = [fast_delta(taps, weights, fraction=0.25) for _ in range(400)]
    draws = [gradients(delta, weights) for delta in deltas]
    for _, *rest in draws:
        torch.testing.assert_close(rest, exact_rest)
    samples = torch.stack([down_in for down_in, *_ in draws])
    error_of_mean = samples.std(0) / 20
    assert ((samples.mean(0) - exact_down_in).abs() / error_of_mean).mean() < 1.2
    record = TapRecord(weights.down_in, TapStorage(fraction=0.25))
    record.add(taps[0])
    assert record.kept.shape == (3, 10, 6)


def test_small_samples_are_not_drawn():
    weights, taps = make_weights(), make_taps(shape=(2, 20, 6))
    sampled, exact = fast_delta(taps, weights, fraction=0.01), fast_delta(taps, weights)
    torch.testing.assert_close(gradients(sampled, weights), gradients(exact, weights))


def test_a_fixed_basis_needs_no_taps():
    weights, taps = make_weights(), make_taps()
    fixed = weights._replace(down_in=weights.down_in.detach())
    record = TapRecord(fixed.down_in)
    record.add(taps[0])
    assert record.kept is None
    trained = tuple(fixed.bottleneck)
    torch.manual_seed(2)
    grads = torch.autograd.grad(fast_delta(taps, fixed).square().sum(), trained)
    expected = torch.autograd.grad(reference_delta(taps, fixed).square().sum(), trained)
    torch.testing.assert_close(grads, expected)


def test_nothing_is_kept_without_gradient():
    with torch.no_grad():
        record = TapRecord(make_weights().down_in)
    record.add(make_taps()[0])
    assert record.kept is None


def test_a_record_without_gradient_gives_none():
    """In place of a gradient from memory that nothing has been written to."""
    weights, taps = make_weights(), make_taps()
    with torch.no_grad():
        record = TapRecord(weights.down_in)
    for tap in taps:
        record.add(tap)
    with pytest.raises(RuntimeError, match='recorded under no_grad'):
        stage_delta(record, weights)
    with torch.no_grad():
        torch.testing.assert_close(stage_delta(record, weights), reference_delta(taps, weights))


@pytest.mark.parametrize(
    ('shapes', 'message'),
    [([(2, 5, 6)] * 4, 'got number 4'), ([(2, 5, 6), (2, 4, 6)], r'number 2 of shape \(2, 4, 6\)')],
)
def test_taps_that_do_not_fit(shapes, message):
    record = TapRecord(make_weights().down_in)
    with pytest.raises(ValueError, match=message):
        for shape in shapes:
            record.add(torch.zeros(shape, dtype=torch.float64))


def test_under_compile():
    weights, taps = make_weights(), make_taps()
    record = TapRecord(weights.down_in)
    for tap in taps:
        record.add(tap)
    # Whether it is traced, forward and backward, is up to us; the code that inductor would write takes long to compile.
    delta = torch.compile(lambda weights: stage_delta(record, weights), fullgraph=True, backend='aot_eager')(weights)
    expected = reference_delta(taps, weights)
    torch.testing.assert_close(delta, expected)
    torch.testing.assert_close(gradients(delta, weights), gradients(expected, weights))
