import numpy as np
import pytest
from helpers import proto
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.grid import EMPTY_SCALE, SMALLEST_SCALE, Grid, dequantize, fake_quantize, quantize
from onnxq.runtime import Session, SessionConfig

UNSIGNED = Grid(8, signed=False, symmetric=False)
BITS = st.integers(2, 8)
GRIDS = st.one_of(
    BITS.map(Grid),
    BITS.map(lambda bits: Grid(bits, signed=False, symmetric=False)),
    BITS.map(lambda bits: Grid(bits, signed=True, symmetric=False)),
)
FLOATS = st.floats(-1e4, 1e4, width=32)


def in_runtime(x, scale, zero_point, axis=None):
    """(codes, floats) of onnxruntime's QuantizeLinear and DequantizeLinear."""
    kind = {"int8": "int8", "uint8": "uint8"}[zero_point.dtype.name]
    dims = ",".join(map(str, x.shape))
    inner = f"[{len(scale)}]" if np.ndim(scale) else ""
    along = "" if axis is None else f"<axis = {axis}>"
    made = proto(
        f"""g (float[{dims}] x, float{inner} s, {kind}{inner} z) => ({kind}[{dims}] q, float[{dims}] d) {{
            q = QuantizeLinear{along}(x, s, z)
            d = DequantizeLinear{along}(q, s, z)
        }}""",
        s=np.asarray(scale, np.float32),
        z=zero_point,
    )
    outputs = Session(made.SerializeToString(), SessionConfig(threads=1, optimize="off")).run({"x": x})
    return outputs["q"], outputs["d"]


def assert_as_in_runtime(x, scale, zero_point, grid, axis=None):
    codes, floats = in_runtime(x, scale, zero_point, axis)
    ours = quantize(x, scale, zero_point, grid, axis)
    assert ours.dtype == np.int32
    np.testing.assert_array_equal(ours, codes)
    np.testing.assert_array_equal(dequantize(ours, scale, zero_point, axis), floats)
    np.testing.assert_array_equal(dequantize(codes, scale, zero_point, axis), floats)
    np.testing.assert_array_equal(fake_quantize(x, scale, zero_point, grid, axis), floats)


@pytest.mark.parametrize("zero_point", [0, 3, 128, 255])
def test_unsigned_codes_are_those_of_the_runtime(zero_point):
    steps = np.arange(-300, 301, dtype=np.float32) / 2  # every other one is a tie
    assert_as_in_runtime(steps * np.float32(0.25), 0.25, np.uint8(zero_point), UNSIGNED)


@pytest.mark.parametrize("zero_point", [-128, -7, 0, 100])
def test_signed_codes_are_those_of_the_runtime(zero_point):
    steps = np.arange(-300, 301, dtype=np.float32) / 2
    assert_as_in_runtime(steps * np.float32(0.5), 0.5, np.int8(zero_point), Grid(8, True, False))


def test_ties_round_to_even():
    assert quantize([0.5, 1.5, 2.5, -0.5, -1.5], 1.0, 0, Grid(8)).tolist() == [0, 2, 2, 0, -2]
    assert quantize([0.5, 1.5], 1.0, 3, UNSIGNED).tolist() == [3, 5]  # the zero point is added after rounding


def test_what_lies_outside_saturates():
    far = np.asarray([1e30, -1e30, np.inf, -np.inf], np.float32)
    assert quantize(far, 0.1, 7, UNSIGNED).tolist() == [255, 0, 255, 0]
    assert quantize(far, 0.1, 0, Grid(4)).tolist() == [7, -7, 7, -7]


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(FLOATS, min_size=1, max_size=20),
    scale=st.floats(2**-10, 64, width=32),
    zero_point=st.integers(0, 255),
)
def test_any_values_get_the_codes_of_the_runtime(values, scale, zero_point):
    assert_as_in_runtime(np.asarray(values, np.float32), scale, np.uint8(zero_point), UNSIGNED)


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_the_axis_is_the_one_that_is_kept(axis):
    x = np.random.default_rng(0).normal(size=(3, 3, 3)).astype(np.float32)  # equal sizes: only the axis tells
    scales = np.asarray([0.001, 0.02, 0.7], np.float32)
    zeros = np.asarray([10, 128, 0], np.uint8)
    assert_as_in_runtime(x, scales, zeros, UNSIGNED, axis)
    first = np.take(x, 0, axis)
    ours = np.take(fake_quantize(x, scales, zeros, UNSIGNED, axis), 0, axis)
    np.testing.assert_array_equal(ours, fake_quantize(first, 0.001, 10, UNSIGNED))


@pytest.mark.parametrize(
    ("grid", "codes"),
    [
        (Grid(8), (-127, 127)),
        (Grid(4), (-7, 7)),
        (Grid(2), (-1, 1)),
        (UNSIGNED, (0, 255)),
        (Grid(4, False, False), (0, 15)),
        (Grid(8, True, False), (-128, 127)),
        (Grid(3, True, False), (-4, 3)),
    ],
)
def test_the_codes_of_a_grid(grid, codes):
    assert (grid.qmin, grid.qmax) == codes


@pytest.mark.parametrize("bits", [1, 9, 0, -8])
def test_other_numbers_of_bits_are_refused(bits):
    with pytest.raises(ValueError, match="2 to 8 or 16 bits"):
        Grid(bits)


def test_an_unsigned_symmetric_grid_is_refused():
    with pytest.raises(ValueError, match="signed"):
        Grid(8, signed=False, symmetric=True)


@settings(max_examples=300, deadline=None)
@given(grid=GRIDS, ends=st.tuples(FLOATS, FLOATS))
def test_a_grid_of_a_range_holds_the_range_and_zero(grid, ends):
    low, high = min(ends), max(ends)
    scale, zero_point = grid.from_range(low, high)
    assert scale > 0
    assert scale == np.float32(scale)
    assert isinstance(zero_point, int)
    assert grid.qmin <= zero_point <= grid.qmax
    assert fake_quantize(0.0, scale, zero_point, grid) == 0.0
    if grid.symmetric:
        assert zero_point == 0
    points = np.linspace(min(low, 0.0), max(high, 0.0), 50, dtype=np.float32)
    gap = np.abs(fake_quantize(points, scale, zero_point, grid) - points)
    # half a step anywhere, up to a step at the ends where the zero point was rounded
    assert gap.max() <= scale * (0.5 if grid.symmetric else 1.0) * (1 + 1e-5) + SMALLEST_SCALE


@settings(max_examples=300, deadline=None)
@given(grid=GRIDS, ends=st.tuples(FLOATS, FLOATS))
def test_a_grid_of_a_range_is_the_smallest(grid, ends):
    low, high = min(*ends, 0.0), max(*ends, 0.0)
    scale, _ = grid.from_range(low, high)
    width = max(-low, high) / grid.qmax if grid.symmetric else (high - low) / (grid.qmax - grid.qmin)
    assert scale == pytest.approx(max(width, SMALLEST_SCALE) if high - low >= SMALLEST_SCALE else EMPTY_SCALE, rel=1e-5)


@settings(max_examples=300, deadline=None)
@given(low=st.floats(2**-10, 100, width=32), high=st.floats(2**-10, 100, width=32), bits=BITS)
def test_the_ends_of_a_range_get_the_outermost_codes(low, high, bits):
    grid = Grid(bits, signed=False, symmetric=False)
    for bottom, top in ((-low, high), (-low, low), (0.0, high), (-low, 0.0)):
        scale, zero_point = grid.from_range(bottom, top)
        assert quantize([bottom, top], scale, zero_point, grid).tolist() == [grid.qmin, grid.qmax]


@pytest.mark.parametrize(("low", "high", "code"), [(0.0, 6.0, 0), (-6.0, 0.0, 255), (2.0, 3.0, 0), (-3.0, -1.0, 255)])
def test_a_one_sided_range_has_its_zero_at_an_end(low, high, code):
    scale, zero_point = UNSIGNED.from_range(low, high)
    assert zero_point == code
    assert scale == pytest.approx(max(abs(low), abs(high)) / 255)


def test_a_constant_zero_tensor_still_gets_a_grid():
    for high in (0.0, 1e-40, 5e-37):
        assert UNSIGNED.from_range(0.0, high) == (EMPTY_SCALE, 0)
        assert Grid(8).from_range(0.0, high) == (EMPTY_SCALE, 0)
        assert Grid(8, signed=True, symmetric=False).from_range(0.0, high) == (EMPTY_SCALE, -128)


@pytest.mark.parametrize("size", [1e-33, 1e-20, 1e-9, 1e20, 1e35])
def test_a_range_of_any_magnitude_has_as_many_codes(size):
    x = (np.linspace(-1, 2, 97) * size).astype(np.float32)
    for grid in (UNSIGNED, Grid(8)):
        scale, zero_point = grid.from_range(float(x.min()), float(x.max()))
        assert np.abs(fake_quantize(x, scale, zero_point, grid) - x).max() <= 0.51 * scale
        assert len(np.unique(quantize(x, scale, zero_point, grid))) > 90


def test_restoring_narrow_codes_does_not_wrap_around():
    restored = dequantize(np.asarray([0, 255], np.uint8), 0.5, np.uint8(128))
    assert restored.tolist() == [-64.0, 63.5]
    assert restored.dtype == np.float32


def test_fake_quantize_is_its_own_fixed_point():
    x = np.random.default_rng(1).normal(size=100).astype(np.float32)
    once = fake_quantize(x, *UNSIGNED.from_range(float(x.min()), float(x.max())), UNSIGNED)
    twice = fake_quantize(once, *UNSIGNED.from_range(float(x.min()), float(x.max())), UNSIGNED)
    np.testing.assert_array_equal(once, twice)
    assert len(np.unique(once)) > 30
