"""Measures of range: values, limits, gradients."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from onnxq.train import ranges  # noqa: E402

torch.set_num_threads(1)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.from_numpy(np.random.default_rng([seed, *shape]).normal(size=shape)).to(dtype)


def test_rows_are_channels_of_the_kept_axis():
    weight = torch.arange(24.0).reshape(2, 3, 4)
    assert ranges.rows_of(weight, None).shape == (1, 24)
    np.testing.assert_array_equal(ranges.rows_of(weight, 1)[2], [8, 9, 10, 11, 20, 21, 22, 23])


def test_linf_is_the_largest_magnitude_and_pulls_on_it_alone():
    rows = torch.tensor([[1.0, -3.0, 2.0], [0.5, 0.25, 0.0]], requires_grad=True)
    found = ranges.linf(rows)
    np.testing.assert_array_equal(found.detach(), [3.0, 0.5])
    found.sum().backward()
    np.testing.assert_array_equal(rows.grad, [[0, -1, 0], [1, 0, 0]])
    tied = torch.tensor([[2.0, -2.0]], requires_grad=True)
    ranges.linf(tied).sum().backward()
    np.testing.assert_array_equal(tied.grad, [[0.5, -0.5]])


@pytest.mark.parametrize("count", [1, 5, 50, 200])
def test_the_best_margin_is_the_mean_of_the_largest(count):
    rows = normal(2, 200)
    magnitudes = rows.abs().sort(dim=1, descending=True).values
    best = magnitudes[:, :count].mean(dim=1)
    torch.testing.assert_close(ranges.top_mean(rows, count), best)
    grid = torch.linspace(0, 4, 2001, dtype=rows.dtype)
    tried = torch.stack([ranges.margin(rows, torch.full((2,), float(bound)), count) for bound in grid])
    torch.testing.assert_close(tried.min(dim=0).values, best, atol=1e-3, rtol=0)
    torch.testing.assert_close(ranges.margin(rows, magnitudes[:, count - 1], count), best)
    torch.testing.assert_close(ranges.margin(rows, -magnitudes[:, count - 1], count), best)


def test_the_ends_of_the_margin_are_linf_and_the_mean_magnitude():
    rows = normal(3, 40)
    torch.testing.assert_close(ranges.top_mean(rows, 1), ranges.linf(rows))
    torch.testing.assert_close(ranges.top_mean(rows, 40), rows.abs().mean(dim=1))


def soft_extremes(row, a):
    """Numpy, from the definition."""
    up, down = np.exp(a * (row - row.max())), np.exp(-a * (row - row.min()))
    return (row * up).sum() / up.sum(), (row * down).sum() / down.sum()


@given(st.integers(0, 1000), st.floats(0, 50), st.floats(-5, 5))
@settings(max_examples=30, deadline=None)
def test_the_soft_range_is_the_definition_within_its_bounds_wherever_zero_is(seed, a, shift):
    rows = normal(3, 30, seed=seed)
    found = ranges.soft_range(rows, torch.tensor(a, dtype=rows.dtype))
    highs, lows = zip(*(soft_extremes(row, a) for row in rows.numpy()), strict=True)
    np.testing.assert_allclose(found, np.subtract(highs, lows), rtol=1e-9, atol=1e-12)
    mean, top, bottom = rows.mean(1).numpy(), rows.amax(1).numpy(), rows.amin(1).numpy()
    assert (mean - 1e-12 <= highs).all()
    assert (highs <= top + 1e-12).all()
    assert (bottom - 1e-12 <= lows).all()
    assert (lows <= mean + 1e-12).all()
    moved = ranges.soft_range(rows + shift, torch.tensor(a, dtype=rows.dtype))
    torch.testing.assert_close(moved, found, rtol=1e-9, atol=1e-9)


def test_temperatures_at_both_ends():
    rows = normal(2, 100)
    zero = torch.zeros(2, dtype=rows.dtype)
    torch.testing.assert_close(ranges.soft_range(rows, zero), zero)
    torch.testing.assert_close(ranges.soft_min_max(rows, zero), zero + 1)
    hard = rows.amax(1) - rows.amin(1)
    torch.testing.assert_close(ranges.soft_range(rows, zero + 1e6), hard)
    per_row = ranges.soft_range(rows, torch.tensor([0.0, 1e6], dtype=rows.dtype))
    torch.testing.assert_close(per_row, torch.stack([zero[0], hard[1]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("a", [0.0, 1.0, 1e4, 1e30, 3e38])
def test_no_temperature_overflows(a, dtype):
    rows = (normal(2, 50) * 1e3).to(dtype).requires_grad_()
    heat = torch.full((2,), a, dtype=dtype, requires_grad=True)
    found = ranges.soft_min_max(rows, heat)
    found.sum().backward()
    for value in (found, rows.grad, heat.grad):
        assert torch.isfinite(value).all()
    if a >= 1e4:
        torch.testing.assert_close(found, rows.amax(1) - rows.amin(1))


def test_a_settled_range_lets_the_temperature_grow():
    heat = torch.tensor([2.0], requires_grad=True)
    ranges.soft_min_max(torch.full((1, 9), 0.3), heat).sum().backward()
    assert heat.grad.item() == pytest.approx(-np.exp(-2.0))


MEASURES = {
    "linf": lambda rows: ranges.linf(rows),
    "top": lambda rows: ranges.top_mean(rows, 3),
    "margin": lambda rows: ranges.margin(rows, torch.tensor([1.0, 0.7], dtype=rows.dtype), 2),
    "soft": lambda rows: ranges.soft_min_max(rows, torch.tensor([3.0, 0.5], dtype=rows.dtype)),
    "spread": ranges.spread,
    "over spread": lambda rows: ranges.linf(rows / ranges.spread(rows)[:, None]),
}


@pytest.mark.parametrize("name", MEASURES)
def test_gradients_are_those_of_finite_differences(name):
    assert torch.autograd.gradcheck(MEASURES[name], (normal(2, 7).requires_grad_(),))


def test_gradients_of_what_is_learned():
    rows = normal(2, 7)
    bound = torch.tensor([-1.0, 0.7], dtype=rows.dtype, requires_grad=True)
    assert torch.autograd.gradcheck(lambda m: ranges.margin(rows, m, 2), (bound,))
    heat = torch.tensor([3.0, 0.5], dtype=rows.dtype, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: ranges.soft_min_max(rows, a), (heat,))


def test_the_spread_is_the_deviation_but_never_far_below_the_whole_weights():
    rows = normal(4, 500) + 3.0
    torch.testing.assert_close(ranges.spread(rows), rows.std(dim=1, correction=0))
    rows = normal(4, 500)
    rows[2] *= 1e-4
    floor = 0.1 * float(rows.square().mean().sqrt())
    assert ranges.spread(rows)[2].item() == pytest.approx(floor)
    assert ranges.spread(rows)[1].item() == pytest.approx(float(rows[1].std(correction=0)))


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("rows", [torch.zeros(2, 9), torch.full((2, 9), -0.7)])
def test_constant_weights_have_finite_ranges_and_gradients(rows, name):
    values = rows.clone().requires_grad_()
    found = MEASURES[name](values / ranges.spread(values)[:, None])
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(values.grad).all()


def test_a_single_weight_has_a_range():
    value = torch.tensor([[-3.0]], requires_grad=True)
    found = ranges.linf(value / ranges.spread(value)[:, None])
    found.sum().backward()
    assert found.item() == pytest.approx(1 / ranges.LEAST_SPREAD)
    assert value.grad.item() == pytest.approx(0, abs=1e-5)
