"""Codebooks: the best few values, and whose they are."""

import itertools

import numpy as np
import pytest
from helpers import model, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.errors import InputError, UsageError
from onnxq.plan import Precision, Range, make_plan, place, plan_from_json, plan_to_json
from onnxq.plan.codebook import codebook_grid, codebooks, short
from onnxq.types import WeightGrid


def normal(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


def steps_of(weight, axis):
    rows = weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    return (np.abs(rows).max(axis=1) / 127).astype(np.float32)


def found(weight, bits, axis=None, per_channel=None):
    """The grid, and the weight as its codes stand for it."""
    steps = steps_of(weight, axis)
    books = codebooks(weight, steps, bits, axis, axis is not None if per_channel is None else per_channel)
    grid = WeightGrid(tuple(map(float, steps)), axis, bits, values=books)
    return grid, grid.codes(weight) * grid.along(steps, weight.ndim)


def least_error(row, counts, steps, count):
    """By trying every split of the sorted weights; values are integers of the int8 grid."""
    units = row.astype(np.float64) / steps
    order = np.argsort(units)
    units, counts = units[order], counts[order]
    best = np.inf
    for size in range(1, count + 1):
        for cuts in itertools.combinations(range(1, len(units)), size - 1):
            parts, shares = np.split(units, cuts), np.split(counts, cuts)
            errors = (
                (share * (part - np.rint((share * part).sum() / share.sum())) ** 2).sum()
                for part, share in zip(parts, shares, strict=True)
            )
            best = min(best, sum(errors))
    return best


@given(st.integers(0, 10_000), st.integers(2, 9), st.sampled_from([1, 2]))
@settings(max_examples=40, deadline=None)
def test_nothing_is_better_than_what_is_found(seed, size, bits):
    row = normal(size, seed=seed)
    grid, made = found(row, bits)
    (book,) = grid.values
    assert len(book) <= 2**bits
    assert list(book) == sorted(set(book))
    error = np.square(made.astype(np.float64) - row).sum()
    step = grid.scales[0]
    assert error <= least_error(row, np.ones(size), step, 2**bits) * step**2 * (1 + 1e-4) + 1e-9


@given(st.integers(0, 10_000), st.sampled_from([1, 2]))
@settings(max_examples=20, deadline=None)
def test_in_a_shared_codebook_weights_count_as_the_square_of_their_channels_step(seed, bits):
    weight = normal(3, 3, seed=seed) * np.float32([[0.1], [1.0], [4.0]])
    grid, made = found(weight, bits, 0, per_channel=False)
    assert len(grid.values) == 1
    steps = np.repeat(np.float64(grid.scales), 3)
    least = least_error(weight.reshape(-1), steps**2, steps, 2**bits)
    assert np.square(made.astype(np.float64) - weight).sum() <= least * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("axis", [0, 1, None])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_each_channel_has_its_own_few_values(bits, axis):
    weight = normal(6, 5, 4, 3) * np.linspace(0.1, 3, 6, dtype=np.float32)[:, None, None, None]
    weight[:, 2] *= 5
    grid, made = found(weight, bits, axis)
    codes = grid.codes(weight)
    assert codes.shape == weight.shape
    assert codes.dtype == np.int8
    assert codes.flags.c_contiguous
    rows = [codes] if axis is None else np.moveaxis(codes, axis, 0)
    assert [tuple(np.unique(row)) for row in rows] == list(grid.values)
    assert all(len(book) == 2**bits for book in grid.values)
    channels = [weight] if axis is None else np.moveaxis(weight, axis, 0)
    given_back = [made] if axis is None else np.moveaxis(made, axis, 0)
    for channel, values in zip(channels, given_back, strict=True):
        np.testing.assert_allclose(values, found(channel, bits)[1], rtol=1e-6)
    low, high = grid.ends()
    assert low.tolist() == [book[0] for book in grid.values]
    assert high.tolist() == [book[-1] for book in grid.values]
    assert not grid.middles().any()


def test_the_error_of_a_normal_weight_is_lloyds():
    """Lloyd-Max quantizers of a normal variable have distortions 0.3634, 0.1175, 0.03454 and 0.009497."""
    weight = normal(200_000)
    for bits, distortion in zip((1, 2, 3, 4), (0.3634, 0.1175, 0.03454, 0.009497), strict=True):
        error = np.square(found(weight, bits)[1] - weight).mean()
        assert error == pytest.approx(distortion, rel=0.02)


def test_more_channels_and_bits_never_hurt():
    weight = normal(8, 30) * np.geomspace(0.1, 10, 8, dtype=np.float32)[:, None]
    errors = [
        [np.square(found(weight, bits, axis, own)[1] - weight).sum() for bits in (1, 2, 3, 4)]
        for axis, own in ((None, False), (0, False), (0, True))
    ]
    assert all(np.diff(row).max() < 0 for row in errors)
    assert (np.asarray(errors[1]) < errors[0]).all()
    assert (np.asarray(errors[2]) < errors[1]).all()


def test_few_different_weights_stay_what_they_are():
    weight = np.float32([[0.5, -1.0, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25]])
    for axis, own in ((0, True), (0, False), (None, False)):
        np.testing.assert_allclose(found(weight, 2, axis, own)[1], weight, atol=0.004)
    assert found(weight, 2, 0, True)[0].values == ((-127, 0, 64), (127,))


@pytest.mark.parametrize("bits", [0, 5])
def test_other_widths_are_refused(bits):
    with pytest.raises(UsageError, match="1 to 4 bits"):
        codebooks(normal(3), np.float32([1]), bits, None, False)


def test_channels_get_codebooks_of_their_own_where_these_are_a_quarter_of_the_indices_at_most():
    """4 bits: 16 bytes of codebook, half a byte per index."""
    for count, books in ((127, 1), (128, 6)):
        assert len(codebook_grid(normal(6, count), None, 4, 0, 0.1).values) == books
    for count, books in ((63, 1), (64, 6)):
        assert len(codebook_grid(normal(6, count), None, 2, 0, 0.1).values) == books
        assert len(codebook_grid(normal(count, 6), None, 2, 1, 0.1).values) == books
    turned = codebook_grid(normal(100, 6, 2, 2), None, 2, 1, 0.1)  # no look-up has this layout
    assert (len(turned.values), len(turned.scales), turned.axis) == (1, 6, 1)
    assert len(codebook_grid(normal(6, 128), None, 4, None, 0.1).values) == 1


def test_steps_leave_room_for_the_bias_and_codes_for_other_processors():
    weight = normal(2, 128)
    plain = codebook_grid(weight, np.float32([0.1, 0.1]), 3, 0, 0.01)
    np.testing.assert_allclose(plain.scales, steps_of(weight, 0), rtol=1e-6)
    biased = codebook_grid(weight, np.float32([1e9, 0.1]), 3, 0, 0.01)
    assert biased.scales[0] == pytest.approx(1e9 / (0.01 * 2**30))
    assert biased.scales[1] == plain.scales[1]
    assert biased.values[0] == tuple(np.unique(np.rint(weight[0] / np.float32(biased.scales[0])).astype(int)))
    whole = codebook_grid(weight, np.float32([-1e9, 0.1]), 3, None, 0.01)
    assert whole.scales == (biased.scales[0],)
    narrow = codebook_grid(weight, None, 3, 0, 0.01, widest=7)
    np.testing.assert_allclose(narrow.scales, steps_of(weight, 0) * 127 / 63, rtol=1e-6)
    assert max(abs(code) for book in narrow.values for code in book) <= 63 < max(map(max, plain.values))


TEXT = """g (float[1,3,6,6] x, float[8,3,3,3] a, float[8,1,3,3] b, float[16,8,3,3] c, float[9,16,2,2] d,
    float[4,9,2,2] e) => (float[1,4,2,2] y) {
    [one] h = Conv<pads = [1, 1, 1, 1]>(x, a) [deep] i = Conv<group = 8, pads = [1, 1, 1, 1]>(h, b)
    [two] j = Conv<pads = [0, 0, 1, 1]>(i, c) [three] k = Conv<strides = [2, 2]>(j, d)
    [last] y = Conv<pads = [1, 1, 0, 0]>(k, e)
}"""
SHAPES = {"a": (8, 3, 3, 3), "b": (8, 1, 3, 3), "c": (16, 8, 3, 3), "d": (9, 16, 2, 2), "e": (4, 9, 2, 2)}


def planned(**precision):
    made = model(TEXT, **{name: weights(*shape) for name, shape in SHAPES.items()})
    placement = place(made)
    ranges = {name: Range(-3.0, 3.0, "given") for name in placement.tensors}
    return made, make_plan(made, placement, ranges, Precision(**precision))


def test_the_ends_and_short_channels_keep_their_codes():
    _, plan = planned(codebook_bits=2, first_last=6, narrow=frozenset({"deep", "two"}))
    bits = {name: (grid.bits, len(grid.values)) for name, grid in plan.weights.items()}
    assert bits == {"one": (6, 0), "deep": (7, 0), "two": (2, 16), "three": (2, 9), "last": (6, 0)}
    assert max(abs(code) for book in plan.weights["two"].values for code in book) <= 63
    assert max(abs(code) for book in plan.weights["three"].values for code in book) > 63
    assert short(np.zeros((2, 31)), 0)
    assert not short(np.zeros((32, 2)), 1)


def test_single_layers_have_codebooks_of_their_own_or_none():
    _, plan = planned(codebook_bits=2, codebooks={"one": 4, "deep": 1, "two": 0})
    bits = {name: (grid.bits, len(grid.values)) for name, grid in plan.weights.items()}
    assert bits == {"one": (4, 1), "deep": (1, 1), "two": (8, 0), "three": (2, 9), "last": (8, 0)}


def test_a_plan_file_holds_codebooks():
    _, plan = planned(codebook_bits=3, codebooks={"deep": 1})
    text = plan_to_json(plan)
    assert plan_from_json(text) == plan
    given = str(list(plan.weights["deep"].values[0]))
    for wrong, said in (("[3, 1]", "ascending"), ("[1, 2, 3]", "up to 2"), ("[1.5]", "integers"), ("[128]", "127")):
        assert given in text
        with pytest.raises(InputError, match=f"weight deep.*{said}"):
            plan_from_json(text.replace(given, wrong))
    with pytest.raises(InputError, match="as many as scales, or a single one"):
        plan_from_json(text.replace(f"[{given}]", f"[{given}, {given}]"))
    with pytest.raises(InputError, match="1 to 4 bits and no lowest"):
        plan_from_json(text.replace('"bits": 1', '"bits": 5'))
