"""Grids and roundings with a gradient."""

import numpy as np
import pytest
from helpers import weights
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from onnxq.grid import Grid, fake_quantize, quantize  # noqa: E402
from onnxq.tune.adaquant import FreeWeight  # noqa: E402
from onnxq.tune.adaround import Rounding  # noqa: E402
from onnxq.tune.quantizers import ActivationQuantizer, FixedCodes  # noqa: E402
from onnxq.types import TensorGrid, WeightGrid  # noqa: E402

torch.set_num_threads(1)  # the sums are small: more threads only wait for each other


def weight_grid(w, bits=4, share=1.0):
    """Steps per output channel of a Conv weight, clipping at `share` of the largest magnitude."""
    top = np.abs(w).reshape(len(w), -1).max(axis=1) * share
    return WeightGrid(tuple(map(float, (top / Grid(bits).qmax).astype(np.float32))), 0, bits)


def steps_of(w, grid):
    return np.asarray(grid.scales, np.float32).reshape(-1, *[1] * (w.ndim - 1))


def slopes(function, at, size=1e-3):
    """Central differences of a scalar function of a vector."""
    result = np.zeros(at.shape)
    for index in np.ndindex(at.shape):
        ends = []
        for sign in (1, -1):
            moved = at.clone()
            moved[index] += sign * size
            ends.append(float(function(moved)))
        result[index] = (ends[0] - ends[1]) / (2 * size)
    return result


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([2, 3, 4, 8]), st.sampled_from([1.0, 0.7]))
def test_rounding_starts_at_the_float_weight(seed, bits, share):
    w = weights(3, 4, 3, seed=seed)
    grid = weight_grid(w, bits, share)
    rounding = Rounding(w, grid, learn_steps=True)
    codes, qmax = Grid(bits), Grid(bits).qmax
    steps = steps_of(w, grid)
    units = w / steps
    soft = rounding().detach().numpy()
    top = qmax * steps
    np.testing.assert_allclose(soft / top, np.clip(w, -top, top) / top, atol=2e-6)
    hard = rounding.hard_codes().numpy()
    np.testing.assert_array_equal(hard, np.clip(np.floor(units + np.float32(0.5)), codes.qmin, codes.qmax))
    for alpha in (torch.full_like(rounding.alpha, 9.0), torch.full_like(rounding.alpha, -9.0), None):
        with torch.no_grad():
            rounding.alpha.copy_(alpha if alpha is not None else torch.randn(rounding.alpha.shape))
        found, after = rounding.found()
        inside = np.abs(units) <= qmax
        assert (np.abs(found - units)[inside] <= 1).all()
        assert found.dtype == np.int8
        assert found.min() >= codes.qmin
        assert found.max() <= codes.qmax
        assert after == grid
    np.testing.assert_allclose(rounding().detach().numpy(), rounding.soft_codes().detach().numpy() * steps)


def test_ties_round_up():
    w = np.asarray([[-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]], np.float32)
    rounding = Rounding(w, WeightGrid((1.0,), 0, 4), learn_steps=False)
    assert rounding.hard_codes().tolist() == [[-2, -1, 0, 1, 2, 3]]
    assert not rounding.log_steps.requires_grad


def test_the_ends_of_the_interval_are_reached():
    rounding = Rounding(np.asarray([[0.3, 0.3]], np.float32), WeightGrid((1.0,), 0, 4), learn_steps=False)
    with torch.no_grad():
        rounding.alpha.copy_(torch.tensor([[2.4, -2.4]]))  # 1.2 sigmoid(2.4) - 0.1 = 1.0002, and 1 minus that
    assert rounding.soft_codes().tolist() == [[1.0, 0.0]]
    with torch.no_grad():
        rounding.alpha.copy_(torch.tensor([[1.0, -1.0]]))
    np.testing.assert_allclose(rounding.rounding().detach(), [[0.7772703, 0.2227297]], rtol=1e-6)


def test_the_penalty_by_hand():
    w = np.asarray([[0.25, 0.5, 0.9, 3.0]], np.float32)
    rounding = Rounding(w, WeightGrid((1.0,), 0, 4), learn_steps=False, pull=3.0, warm_up=0.2)
    assert rounding.penalty(0.19) is None
    assert Rounding(w, WeightGrid((1.0,), 0, 4), learn_steps=False).penalty(0.9) is None
    for progress, beta in ((0.2, 20.0), (0.6, 11.0), (1.0, 2.0)):
        hand = 3 * np.mean([1 - 0.5**beta, 1.0, 1 - 0.8**beta, 0.0])
        assert rounding.penalty(progress).item() == pytest.approx(hand, abs=1e-4)
    with torch.no_grad():
        rounding.alpha.copy_(torch.full((1, 4), 9.0))
    assert rounding.penalty(1.0).item() == 0


def test_gradients_of_rounding_against_differences():
    w = weights(2, 3, 2)
    rounding = Rounding(w, weight_grid(w, 3, 0.6), learn_steps=True, pull=0.7)
    target = torch.from_numpy(weights(2, 3, 2, seed=1))
    torch.manual_seed(0)
    start = torch.randn(rounding.alpha.shape)
    with torch.no_grad():
        rounding.alpha.copy_(start)
        rounding.log_steps.copy_(torch.tensor([0.1, -0.2]))
    logs = rounding.log_steps.detach().clone()

    def loss():
        return torch.sum((rounding() - target) ** 2) + rounding.penalty(0.5)

    def at(alpha, log_steps):
        with torch.no_grad():
            rounding.alpha.copy_(alpha)
            rounding.log_steps.copy_(log_steps)
            return loss()

    loss().backward()
    found = rounding.alpha.grad.numpy(), rounding.log_steps.grad.numpy()
    assert np.abs(found[0]).max() > 0.1
    np.testing.assert_allclose(found[0], slopes(lambda alpha: at(alpha, logs), start), rtol=0.02, atol=5e-3)
    np.testing.assert_allclose(found[1], slopes(lambda moved: at(start, moved), logs), rtol=0.02, atol=5e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([2, 4, 8]))
def test_a_free_weight_starts_at_plain_rounding(seed, bits):
    w = weights(3, 4, 3, seed=seed)
    grid = weight_grid(w, bits, 0.8)
    free = FreeWeight(w, grid, learn_steps=True)
    steps = np.asarray(grid.scales, np.float32)
    codes, after = free.found()
    np.testing.assert_array_equal(codes, quantize(w, steps, np.int32(0), Grid(bits), 0))
    np.testing.assert_array_equal(free().detach(), fake_quantize(w, steps, np.int32(0), Grid(bits), 0))
    assert after == grid


def test_a_free_weight_may_move_by_more_than_a_step():
    w = np.asarray([[0.3, -1.2, 2.0, 6.0]], np.float32)
    free = FreeWeight(w, WeightGrid((0.5,), 0, 4), learn_steps=True)
    with torch.no_grad():
        free.moved.copy_(torch.tensor([[2.1, -1.0, 9.0, 0.0]]))  # in steps of the start
        free.log_steps.copy_(torch.tensor([np.log(2.0)]))
    codes, grid = free.found()
    assert codes.tolist() == [[1, -2, 6, 6]]  # (0.6 + 2.1) / 2, (-2.4 - 1) / 2, (4 + 9) / 2 = 6.5 to even, 12 / 2
    assert grid.scales == pytest.approx((1.0,))


def test_gradients_of_a_free_weight():
    """d/dV = s0 inside the grid and 0 outside; d/d(log s) = s (q - u) inside and s q outside, u = (W + V) / s."""
    w = np.asarray([[0.3, -1.2, 2.1, 9.0, -8.0]], np.float32)
    free = FreeWeight(w, WeightGrid((0.5,), 0, 4), learn_steps=True)
    factors = torch.tensor([[1.0, 2.0, -3.0, 5.0, 7.0]])
    (free() * factors).sum().backward()
    np.testing.assert_allclose(free.moved.grad, [[0.5, 1.0, -1.5, 0.0, 0.0]], rtol=1e-6)
    units = w[0] / 0.5
    codes = np.clip(np.rint(units), -7, 7)
    per_value = np.where(np.abs(units) <= 7, codes - units, codes) * 0.5
    np.testing.assert_allclose(free.log_steps.grad, [float(per_value @ factors.numpy()[0])], rtol=1e-5)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([2, 4, 8]), st.booleans(), st.floats(0, 1))
def test_an_activation_is_rounded_as_the_runtime_does(seed, bits, signed, place):
    codes = Grid(bits, signed, symmetric=False)
    zero = round(codes.qmin + place * (codes.qmax - codes.qmin))
    grid = TensorGrid(float(np.float32(0.37)), zero, bits, signed)
    x = np.float32(0.2 * 2**bits) * weights(50, seed=seed)
    ties = np.float32(grid.scale) * (np.arange(-20, 20) + np.float32(0.5)).astype(np.float32)
    x = np.concatenate([x, ties])
    quantizer = ActivationQuantizer(grid, learn=True)
    wanted = fake_quantize(x, np.float32(grid.scale), zero, codes)
    np.testing.assert_array_equal(quantizer(torch.from_numpy(x)).detach(), wanted)
    assert quantizer.found() == grid
    assert quantizer.shift.requires_grad == (codes.qmin < zero < codes.qmax)


def test_gradients_of_an_activation_grid():
    """d/d(log s) = s (q - z - x / s) inside, s (q - z) at the ends; d/dz = 0 inside, -s at the ends (Esser et al.)."""
    x = np.asarray([0.33, -0.71, 1.9, 30.0, -30.0], np.float32)
    step, zero = 0.5, 5
    quantizer = ActivationQuantizer(TensorGrid(step, zero, 4), learn=True)
    data = torch.from_numpy(x).requires_grad_()
    factors = np.asarray([1.0, 2.0, -3.0, 5.0, 7.0], np.float32)
    (quantizer(data) * torch.from_numpy(factors)).sum().backward()
    codes = np.clip(np.rint(x / step) + zero, 0, 15)
    inside = np.asarray([True, True, True, False, False])
    per_value = step * np.where(inside, codes - zero - x / step, codes - zero)
    np.testing.assert_allclose(quantizer.log_step.grad, per_value @ factors, rtol=1e-5)
    np.testing.assert_allclose(quantizer.shift.grad, -step * factors[~inside].sum(), rtol=1e-6)
    np.testing.assert_allclose(data.grad, np.where(inside, factors, 0))


def test_what_an_activation_grid_found():
    quantizer = ActivationQuantizer(TensorGrid(0.5, 5, 4, rule="seen"), learn=True)
    with torch.no_grad():
        quantizer.log_step.copy_(torch.tensor(0.2))
        quantizer.shift.copy_(torch.tensor(2.6))
        quantizer.limit()
    found = quantizer.found()
    assert found.scale == pytest.approx(0.5 * np.exp(0.2))
    assert (found.zero_point, found.bits, found.rule) == (8, 4, "seen")
    with torch.no_grad():
        quantizer.shift.copy_(torch.tensor(99.0))
    assert quantizer.found().zero_point == 15
    x = torch.from_numpy(weights(40))
    wanted = fake_quantize(x.numpy(), np.float32(quantizer.found().scale), 15, Grid(4, False, symmetric=False))
    np.testing.assert_array_equal(quantizer(x).detach(), wanted)


@pytest.mark.parametrize(("zero", "cuts"), [(0, False), (15, False), (5, True)])
def test_a_grid_that_cuts_does_not_grow(zero, cuts):
    quantizer = ActivationQuantizer(TensorGrid(0.5, zero, 4), learn=True, cuts=cuts)
    assert quantizer.log_step.requires_grad
    assert not quantizer.shift.requires_grad
    for moved, kept in ((0.3, 0.0), (-0.3, -0.3)):
        with torch.no_grad():
            quantizer.log_step.fill_(moved)
        quantizer.limit()
        assert quantizer.log_step.item() == pytest.approx(kept)
    assert not ActivationQuantizer(TensorGrid(0.5, 5, 4), learn=False).log_step.requires_grad


def test_dropped_roundings():
    quantizer = ActivationQuantizer(TensorGrid(1.0, 0, 8), learn=False, drop=0.25)
    x = torch.full((40000,), 0.4)
    torch.manual_seed(0)
    assert float((quantizer.train()(x) == x).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert not quantizer.eval()(x).any()


def test_fixed_codes_stay():
    codes = np.asarray([[1, -7], [3, 0]], np.int8)
    fixed = FixedCodes(codes, WeightGrid((0.5, 0.25), 1, 4))
    assert fixed().tolist() == [[0.5, -1.75], [1.5, 0.0]]
    np.testing.assert_array_equal(fixed.found()[0], codes)
    assert not any(parameter.requires_grad for parameter in fixed.parameters())
