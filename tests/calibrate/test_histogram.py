import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.calibrate.histogram import BINS, VALUES_PER_BATCH, Histogram

MODEST = st.floats(-1e6, 1e6, width=32)


def collected(*batches, rows=True, seed=0):
    histogram = Histogram("x", seed)
    for batch in batches:
        histogram.add(np.asarray(batch, np.float32), rows=rows)
    return histogram.stats()


def edges_of(stats):
    return np.linspace(-stats.limit, stats.limit, len(stats.counts) + 1)


@settings(max_examples=60, deadline=None)
@given(table=st.lists(st.lists(MODEST, min_size=3, max_size=3), min_size=1, max_size=30), data=st.data())
def test_pieces_give_what_the_whole_gives(table, data):
    x = np.asarray(table, np.float32)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(x)), max_size=6)))
    whole, pieces = collected(x), collected(*np.split(x, cuts))
    assert (pieces.low, pieces.high) == (whole.low, whole.high) == (x.min(), x.max())
    for stats in (whole, pieces):
        assert stats.mean_low == pytest.approx(x.min(axis=1).mean(dtype=np.float64), rel=1e-6, abs=1e-6)
        assert stats.mean_high == pytest.approx(x.max(axis=1).mean(dtype=np.float64), rel=1e-6, abs=1e-6)
        assert stats.counts.sum() == stats.count == x.size
        assert stats.finite
        assert stats.limit >= np.abs(x).max() or not stats.limit
    assert whole.shape == x.shape


@pytest.mark.parametrize("scales", [(1, 1), (1, 1.5), (1, 3, 50, 0.1), (0.01, 700), (5, 1)])
def test_growing_keeps_every_value_in_its_bin(scales):
    x = [np.random.default_rng(7).normal(size=5000).astype(np.float32) * scale for scale in scales]
    stats = collected(*x)
    first = np.abs(x[0]).max() * 1.0001
    doublings = np.log2(stats.limit / first)
    assert doublings == pytest.approx(round(doublings), abs=1e-6)
    assert stats.limit >= max(np.abs(part).max() for part in x) > stats.limit / 2 or round(doublings) == 0
    wanted, _ = np.histogram(np.concatenate(x), edges_of(stats))
    assert stats.counts.sum() == wanted.sum() == 5000 * len(scales)
    # a value on an edge may fall on either side of it
    assert np.abs(np.cumsum(stats.counts) - np.cumsum(wanted)).max() <= 2
    assert np.abs(stats.counts - wanted).sum() < 0.01 * wanted.sum()


def test_the_size_of_the_state_does_not_depend_on_the_data():
    def bytes_of(count):
        histogram = Histogram("x")
        for index in range(count):
            histogram.add(np.random.default_rng(index).normal(size=(9, 50)).astype(np.float32) * 3**index)
        return sum(getattr(value, "nbytes", 8) for value in vars(histogram).values())

    assert bytes_of(1) == bytes_of(20) == pytest.approx(8 * BINS, rel=0.02)


@pytest.mark.parametrize("shape", [(12, 96, 384), (1, 3, 512, 500), (VALUES_PER_BATCH + 1,), (4, 64, 56, 56)])
def test_thinning_keeps_the_total_and_visits_all_channels_and_positions_equally(shape):
    for axis in range(len(shape)):
        place = np.indices(shape)[axis] % 61  # which channel (row, column) a value belongs to
        stats = collected(place.astype(np.float32))
        assert stats.counts.sum() == pytest.approx(place.size, rel=1e-9)
        assert stats.count == place.size
        seen, _ = np.histogram(edges_of(stats)[:-1] + stats.limit / BINS, np.arange(62) - 0.5, weights=stats.counts)
        np.testing.assert_allclose(seen, np.bincount(place.reshape(-1), minlength=61), rtol=0.12)


def test_thinning_leaves_small_batches_alone_and_extremes_are_exact():
    x = np.random.default_rng(1).uniform(-1, 1, VALUES_PER_BATCH).astype(np.float32)
    assert set(collected(x).counts) <= set(range(1000))
    large = np.zeros((3, 100_000), np.float32)
    large[1, 777], large[2, 5] = 9.5, -3.25
    stats = collected(large)
    assert (stats.low, stats.high) == (-3.25, 9.5)
    assert stats.mean_low == pytest.approx(-3.25 / 3)
    assert stats.mean_high == pytest.approx(9.5 / 3)


def test_seed_decides_what_thinning_keeps():
    x = np.random.default_rng(2).normal(size=300_000).astype(np.float32)
    same = [collected(x, seed=3).counts for _ in range(2)]
    np.testing.assert_array_equal(*same)
    assert any((collected(x, seed=seed).counts != same[0]).any() for seed in range(4, 9))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_flagged_and_left_out(bad):
    x = np.random.default_rng(3).normal(size=(6, 40)).astype(np.float32)
    holed = np.concatenate([x, np.full((2, 40), bad, np.float32)])
    holed[1, 7] = bad
    stats, clean = collected(holed), collected(x)
    kept = np.delete(x[1], 7)
    assert clean.finite
    assert not stats.finite
    assert stats.count == stats.counts.sum() == x.size - 1
    assert (stats.low, stats.high) == (np.delete(x.ravel(), 47).min(), np.delete(x.ravel(), 47).max())
    assert stats.mean_low == pytest.approx((x[[0, 2, 3, 4, 5]].min(axis=1).sum() + kept.min()) / 6, rel=1e-6)
    assert stats.mean_high == pytest.approx((x[[0, 2, 3, 4, 5]].max(axis=1).sum() + kept.max()) / 6, rel=1e-6)
    assert not collected(x, holed, x).finite


def test_nothing_but_infinities():
    stats = collected([[np.inf, np.nan]])
    assert (stats.low, stats.high, stats.count, stats.finite) == (0.0, 0.0, 0, False)
    assert not stats.counts.any()


def test_zeros_then_values():
    assert collected(np.zeros((2, 3))).limit == 0.0
    stats = collected(np.zeros((2, 3)), [[4.0, -1.0]])
    assert stats.count == stats.counts.sum() == 8
    assert (stats.low, stats.high) == (-1.0, 4.0)
    assert stats.counts[BINS // 2] == 6
    assert stats.mean_high == pytest.approx(4.0 / 3)
    again = collected([[4.0, -1.0]], np.zeros((2, 3)))
    np.testing.assert_array_equal(again.counts, stats.counts)


@pytest.mark.parametrize("value", [5.0, -5.0, 1e-20, 3.4e38, -3.4e38])
def test_constants_land_in_one_bin(value):
    stats = collected(np.full((3, 2), value), np.full((1, 2), value))
    (at,) = np.flatnonzero(stats.counts)
    assert stats.counts[at] == 8
    assert edges_of(stats)[at] <= value <= edges_of(stats)[at + 1]
    assert stats.low == stats.high == stats.mean_low == stats.mean_high == np.float32(value)


def test_the_largest_value_that_fits_lands_in_the_last_bin():
    for seed in range(40):
        histogram = Histogram("x")
        histogram.add(np.random.default_rng(seed).uniform(0.1, 9, 1).astype(np.float32))
        limit = 2 * histogram.stats().limit
        most = np.float32(limit)
        if float(most) > limit:
            most = np.nextafter(most, np.float32(0))
        histogram.add(np.array([most, -most]))
        stats = histogram.stats()
        assert stats.limit == limit
        assert stats.counts[-1] == stats.counts[0] == 1


def test_values_too_small_for_bins_count_as_zero():
    stats = collected([[1e-38, -1e-40, 1e-44]])
    assert stats.limit == 0.0
    assert stats.counts[BINS // 2] == 3
    assert stats.high == np.float32(1e-38)


def test_scalars_vectors_and_empty_tensors():
    scalar = collected(np.float32(2.5))
    assert (scalar.low, scalar.high, scalar.count, scalar.shape) == (2.5, 2.5, 1, ())
    vector = collected([1.0, 3.0], [-2.0])  # one number per row
    assert vector.mean_low == vector.mean_high == pytest.approx(2.0 / 3)
    assert vector.shape == (2,)
    empty = collected(np.zeros((0, 4)))
    assert (empty.low, empty.high, empty.mean_low, empty.mean_high, empty.count) == (0, 0, 0, 0, 0)
    assert empty.shape == (0, 4)
    assert collected(np.zeros((2, 0)), [[1.0]]).count == 1


def test_a_batch_may_be_one_sample():
    x = [[1.0, -4.0], [7.0, 2.0]]
    assert collected(x, rows=False).mean_high == 7.0
    assert collected(x, rows=True).mean_high == 4.0


def test_stats_are_a_snapshot():
    histogram = Histogram("x")
    histogram.add(np.ones((1, 4), np.float32))
    before = histogram.stats()
    histogram.add(np.full((1, 4), -8, np.float32))
    assert before.counts.sum() == 4
    assert before.low == 1.0
    assert before.name == "x"
