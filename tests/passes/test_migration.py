import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.grid import Grid, fake_quantize
from onnxq.passes import migration
from onnxq.passes.migration import search, smooth
from onnxq.passes.readings import Migration


def outputs(x, w, moved_by, bits):
    """X W as a per-tensor grid over the whole range and a grid per output column give it."""
    moved = x / moved_by.ratios - moved_by.shifts
    wide = w * moved_by.ratios[:, None]
    activation, weight = Grid(bits, signed=False, symmetric=False), Grid(bits)
    scale, zero = activation.from_range(moved.min(), moved.max())
    steps = np.abs(wide).max(0) / weight.qmax
    rounded = fake_quantize(wide, steps, 0, weight, axis=1)
    return fake_quantize(moved, scale, zero, activation) @ rounded + moved_by.shifts @ wide


def error(x, w, moved_by, bits):
    return float(np.mean((outputs(x, w, moved_by, bits) - x @ w) ** 2))


IDENTITY = Migration(np.ones(16), np.zeros(16), 1.0, 0)


def data(spread, offset, seed=0):
    random = np.random.default_rng(seed)
    x = random.normal(size=(300, 16)) * np.exp(spread * random.normal(size=16)) + offset * random.normal(size=16)
    return x, random.normal(size=(16, 12))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0, 1))
def test_smooth_is_the_formula_up_to_a_common_factor(seed, strength):
    random = np.random.default_rng(seed)
    x, w = random.uniform(0.1, 9, 6), random.uniform(0.1, 9, 6)
    found = smooth(x, w, strength)
    wanted = x**strength / w ** (1 - strength)
    np.testing.assert_allclose(found / found[0], wanted / wanted[0])
    assert np.log(found).mean() == pytest.approx(0, abs=1e-12)


def test_smooth_leaves_dead_channels():
    np.testing.assert_allclose(smooth([4.0, 0.0, 1.0, 9.0], [1.0, 3.0, 1.0, 0.0], 0.5), [2**0.5, 1, 0.5**0.5, 1])
    np.testing.assert_array_equal(smooth([0.0], [1.0], 0.5), 1)


@pytest.mark.parametrize("kind", ["mse", "mae"])
def test_search_helps_where_channels_differ(kind):
    x, w = data(1.5, 0.0)
    found = search(x, [w[:, :7], w[:, 7:]], 8, 8, error=kind)
    assert not found.is_identity
    assert error(x, w, found, 8) < 0.5 * error(x, w, IDENTITY, 8)


def test_search_centres_channels_only_where_it_may():
    x, w = data(0.0, 8.0)
    shifted, scaled = search(x, [w], 8, 8), search(x, [w], 8, 8, shift=False)
    assert shifted.shifts.any()
    assert not scaled.shifts.any()
    assert error(x, w, shifted, 8) < 0.3 * error(x, w, scaled, 8)


def test_search_returns_the_identity_where_nothing_helps():
    random = np.random.default_rng(3)
    x = random.choice([-1.0, 1.0], size=(200, 16))
    w = random.choice([-1.0, 1.0], size=(16, 12))
    assert search(x, [w], 8, 8).is_identity


def test_search_wants_a_gain_that_is_worth_it(monkeypatch):
    x, w = data(1.5, 0.0)
    monkeypatch.setattr(migration, "LEAST_GAIN", 0.999999)
    assert search(x, [w], 8, 8).is_identity


def test_search_looks_at_ranges_beyond_the_sample():
    """What the sample misses still has to fit: the grid that is aimed at covers it."""
    x, w = data(1.5, 0.0)
    high = x.max(0)
    high[3] = 50.0
    found = search(x, [w], 8, 8, high=high)
    moved = high / found.ratios - found.shifts
    assert moved.max() <= (255 - found.zero_point) * found.scale * 1.001


def test_search_weighs_the_rounding_of_the_weights():
    """At 3-bit weights and 8-bit activations less of the spread may move than at 8 and 3 bits."""
    x, w = data(1.0, 0.0, seed=5)
    spread = [np.ptp(np.log(search(x, [w], a, b, shift=False).ratios)) for a, b in ((8, 3), (3, 8))]
    assert spread[0] < spread[1]


def test_weights_are_rounded_as_the_plan_will_round_them():
    random = np.random.default_rng(3)
    x, w = random.normal(size=(64, 6)) * np.geomspace(0.1, 10, 6), random.normal(size=(6, 4))
    seen = []

    def largest(matrix, grid):
        seen.append((matrix.shape, grid.bits))
        return np.abs(matrix).max(0) / grid.qmax

    def useless(matrix, grid):
        """Steps that suit the weight as it is and no other."""
        return largest(matrix, grid) if np.allclose(matrix, w) else np.full(4, 1e-3)

    plain = search(x, [w], 4, 4)
    assert not plain.is_identity
    np.testing.assert_array_equal(search(x, [w], 4, 4, steps_of=largest).ratios, plain.ratios)
    assert set(seen) == {((6, 4), 4)}
    chosen = search(x, [w], 4, 4, steps_of=useless)
    np.testing.assert_allclose(chosen.ratios, 1.0)
