import numpy as np
import pytest
from helpers import model, weights
from hypothesis import given, settings
from hypothesis import strategies as st
from planning import planned

from onnxq.grid import Grid, fake_quantize
from onnxq.plan import Precision
from onnxq.plan.weights import absmax, least_squares, offset_least_squares, room_for_bias, weight_grid

BITS = [2, 3, 4, 5, 6, 7, 8]


def error(weight, steps, grid, axis):
    """Squared rounding error per index of `axis` (in all without one)."""
    gap = np.square(fake_quantize(weight, steps if axis is not None else steps[0], 0, grid, axis) - weight)
    return gap.sum(axis=tuple(i for i in range(weight.ndim) if i != axis)) if axis is not None else gap.sum()


@pytest.mark.parametrize("axis", [0, 1, 2, None])
def test_absmax_is_the_smallest_step_without_clipping(axis):
    weight = weights(3, 4, 5) * np.asarray([1, 10, 100], np.float32).reshape(3, 1, 1)
    rows = (
        np.abs(weight).max(axis=tuple(i for i in range(3) if i != axis)) if axis is not None else [np.abs(weight).max()]
    )
    steps = absmax(weight, Grid(8), axis)
    assert steps.dtype == np.float32
    np.testing.assert_allclose(steps, np.asarray(rows) / 127, rtol=1e-6)
    np.testing.assert_allclose(absmax(weight, Grid(4), axis), np.asarray(rows) / 7, rtol=1e-6)


@pytest.mark.parametrize("rule", [absmax, least_squares])
def test_dead_channels_get_a_usual_step(rule):
    weight = weights(5, 8)
    weight[1] = 0
    weight[3] = 1e-12
    steps = rule(weight, Grid(8), 0)
    assert steps[1] == steps[3] == np.median(absmax(weight[[0, 2, 4]], Grid(8), 0))
    assert not fake_quantize(weight, steps, 0, Grid(8), 0)[[1, 3]].any()


@pytest.mark.parametrize("rule", [absmax, least_squares])
@pytest.mark.parametrize("axis", [0, None])
def test_a_weight_of_zeros_gets_a_positive_step(rule, axis):
    steps = rule(np.zeros((3, 4), np.float32), Grid(8), axis)
    assert (steps > 0).all()
    assert np.isfinite(steps).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("tails", ["normal", "uniform", "heavy"])
def test_least_squares_is_near_the_best_of_a_fine_scan(bits, axis, tails):
    generator = np.random.default_rng(3)
    weight = {
        "normal": generator.normal(size=(2, 3000)),
        "uniform": generator.uniform(-1, 1, size=(2, 3000)),
        "heavy": generator.standard_t(5, size=(2, 3000)),
    }[tails].astype(np.float32)
    weight = weight if axis != 1 else weight.T
    grid = Grid(bits)
    widest = absmax(weight, grid, axis)
    scan = [error(weight, widest * np.float32(share), grid, axis) for share in np.linspace(0.08, 1.02, 150)]
    found = error(weight, least_squares(weight, grid, axis), grid, axis)
    assert (found <= 1.04 * np.min(scan, axis=0)).all()
    assert (found <= error(weight, widest, grid, axis)).all()


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_least_squares_of_a_few_weights_is_not_far_from_the_best(bits):
    weight = weights(6, 9)  # a depthwise convolution
    grid = Grid(bits)
    widest = absmax(weight, grid, 0)
    scan = [error(weight, widest * np.float32(share), grid, 0) for share in np.linspace(0.1, 1.05, 400)]
    found = error(weight, least_squares(weight, grid, 0), grid, 0)
    assert found.sum() <= 1.6 * np.min(scan, axis=0).sum()
    assert (found <= error(weight, widest, grid, 0)).all()


def test_least_squares_clips_where_that_helps():
    weight = weights(1, 2000)
    weight[0, 0] = 8.0
    assert least_squares(weight, Grid(4), 0)[0] < 0.6 * absmax(weight, Grid(4), 0)[0]


def test_least_squares_depends_on_each_channel_alone():
    weight = weights(4, 50)
    alone = np.concatenate([least_squares(row[None], Grid(3), 0) for row in weight])
    np.testing.assert_array_equal(least_squares(weight, Grid(3), 0), alone)


@settings(max_examples=100, deadline=None)
@given(
    scale=st.floats(2**-26, 2**3, width=32),
    steps=st.lists(st.floats(2**-26, 2, width=32), min_size=1, max_size=4),
    largest=st.floats(0, 2**20, width=32),
)
def test_a_bias_always_fits_32_bits(scale, steps, largest):
    bias = np.linspace(-largest, largest, len(steps), dtype=np.float32)
    roomy = room_for_bias(np.asarray(steps, np.float32), bias, scale)
    codes = bias.astype(np.float64) / (np.float32(scale) * roomy).astype(np.float64)
    assert np.abs(codes).max() <= 2**30 * (1 + 1e-5)  # as much again is left for the sum of products
    assert (roomy >= np.asarray(steps, np.float32)).all()


def test_steps_with_room_for_the_bias_stay_as_they_are():
    steps = np.asarray([0.01, 0.02], np.float32)
    np.testing.assert_array_equal(room_for_bias(steps, np.asarray([1, -1], np.float32), 0.1), steps)
    np.testing.assert_array_equal(room_for_bias(steps, None, 1e-30), steps)
    grown = room_for_bias(steps, np.asarray([1, -(2**20)], np.float32), 2.0**-20)
    np.testing.assert_allclose(grown, [0.01, 2**20 * 2**20 / 2**30], rtol=1e-6)


TEXT = "g (float[4,8] x, float[8,3] w, float[3] b) => (float[4,3] y) { [n] y = Gemm(x, w, b) }"


@pytest.mark.parametrize("bits", BITS)
def test_a_plan_takes_absmax_at_8_and_7_bits_and_offset_least_squares_below(bits):
    w = weights(8, 3)
    found = planned(model(TEXT, w=w, b=weights(3)), {"x": weights(4, 8)}, Precision(first_last=bits)).weights["n"]
    steps, lowest = (absmax(w, Grid(bits), 1), ()) if bits >= 7 else offset_least_squares(w, bits, 1)
    assert found.scales == pytest.approx(steps, rel=1e-7)
    assert found.lowest == tuple(lowest)
    assert (found.bits, found.axis) == (bits, 1)


@settings(max_examples=30, deadline=None)
@given(bits=st.integers(2, 6), axis=st.sampled_from([0, 1, None]), shift=st.floats(-2, 2), seed=st.integers(0, 99))
def test_codes_begin_where_the_weights_do(bits, axis, shift, seed):
    """Never worse than the symmetric grid of as many bits, much better where all weights have one sign, exact codes."""
    w = weights(5, 400, seed=seed) + np.float32(shift)
    w = w if axis != 1 else w.T.copy()
    grid = weight_grid(w, None, bits, axis, 1.0)
    codes = grid.codes(w)
    low, high = (grid.along(ends, 2) for ends in grid.ends())
    assert (codes >= low).all()
    assert (codes <= high).all()
    assert (high - low == 2**bits - 1).all()
    assert (low <= 0).all()
    assert (high >= 0).all()
    steps = grid.along(np.asarray(grid.scales, np.float32), 2)
    np.testing.assert_array_equal(codes, np.clip(np.rint(w / steps), low, high))
    found = np.square(codes * steps - w).sum()
    assert found <= 1.02 * error(w, least_squares(w, Grid(bits), axis), Grid(bits), axis).sum()
    if abs(shift) > 1.5:
        assert found < 0.65 * error(w, least_squares(w, Grid(bits), axis), Grid(bits), axis).sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_offset_grids_are_near_the_best_of_a_fine_scan(bits):
    """Over steps and all places where codes can begin."""
    rows = np.random.default_rng(1).gumbel(0.4, 1, (3, 500)).astype(np.float32)
    last = 2**bits - 1
    steps, lowest = offset_least_squares(rows, bits, 0)

    def loss(row, step, low):
        return np.square(np.clip(np.rint(row / step), low, low + last) * step - row).sum()

    for row, step, low in zip(rows, steps, lowest, strict=True):
        scan = np.linspace(0.02, 1, 120) * (row.max() - row.min()) / last
        best = min(loss(row, one, start) for one in scan for start in range(-last, 1))
        assert loss(row, step, low) <= 1.1 * best


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_plan_leaves_room_for_the_bias(per_channel):
    w, b = np.float32(1e-4) * weights(8, 3), np.asarray([1e4, 0, -3e5], np.float32)
    x = np.float32(1e-3) * weights(4, 8)
    found = planned(model(TEXT, w=w, b=b), {"x": x}, Precision(per_channel=per_channel))
    scales = np.asarray(found.weights["n"].scales)
    assert len(scales) == (3 if per_channel else 1)
    assert np.abs(b / (found.tensors["x"].scale * scales)).max() <= 2**30 * (1 + 1e-5)
    if per_channel:
        assert scales[1] == pytest.approx(np.abs(w[:, 1]).max() / 127)  # only where it is needed
