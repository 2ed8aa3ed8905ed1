import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.calibrate.density import Density
from onnxq.calibrate.histogram import Histogram
from onnxq.calibrate.ranges import RULES, AveragedMinMax, Distance, Entropy, MinMax, Percentile
from onnxq.grid import Grid, fake_quantize

COUNT = 6000


def unsigned(bits):
    return Grid(bits, signed=False, symmetric=False)


EIGHT, FOUR = unsigned(8), unsigned(4)
GRIDS = [EIGHT, FOUR, unsigned(2), Grid(8), Grid(4), Grid(8, signed=True, symmetric=False)]


def stats_of(x, rows=1):
    """Statistics of all values, none thinned out."""
    histogram = Histogram("x")
    for part in np.array_split(np.asarray(x, np.float32).reshape(rows, -1), max(1, np.size(x) // 50_000), axis=1):
        histogram.add(part)
    return histogram.stats()


def samples(kind, count=COUNT):
    g = np.random.default_rng(11)
    normal = g.normal(size=count)
    x = {
        "uniform": lambda: g.uniform(-1, 2, count),
        "normal": lambda: normal,
        "half-normal": lambda: np.abs(normal),
        "laplace": lambda: g.laplace(size=count),
        "bimodal": lambda: np.where(g.random(count) < 0.5, g.normal(-3, 0.3, count), g.normal(5, 0.3, count)),
        "outliers": lambda: np.concatenate([np.maximum(normal, 0), [25.0, 40.0]]),
        "both outliers": lambda: np.concatenate([normal, [60.0, -22.0]]),
        "negative": lambda: -np.abs(g.laplace(size=count)),
        "gelu": lambda: normal * 0.75 * (1 + np.tanh(1.2 * normal)),
        "far from zero": lambda: g.normal(8, 1, count),
    }[kind]()
    return np.asarray(x, np.float32)


def error(x, low, high, grid, power):
    scale, zero = grid.from_range(low, high)
    return float(np.mean(np.abs(x - fake_quantize(x, scale, zero, grid)).astype(np.float64) ** power))


def brute_force(x, grid, power, fine=22):
    """The least error over clippings of both ends: a grid over three decades, then finer ones around its best."""
    ends = np.array([min(float(x.min()), 0.0), max(float(x.max()), 0.0)])
    if grid.symmetric:
        ends = np.array([-1.0, 1.0]) * np.abs(ends).max()
    ratio = 1000 ** (1 / (fine - 1))
    shares, best, least = np.geomspace(1, 1e-3, fine), np.ones(2), np.inf
    for _ in range(4):
        lower, upper = (
            np.clip(centre * shares, 0, 1) if end else [1.0] for centre, end in zip(best, ends, strict=True)
        )
        pairs = [(b, b) for b in upper] if grid.symmetric else [(a, b) for a in lower for b in upper]
        found, pair = min((error(x, ends[0] * a, ends[1] * b, grid, power), (a, b)) for a, b in pairs)
        if found < least:
            least, best = found, np.array(pair)
        shares, ratio = ratio ** np.linspace(-1, 1, 9), ratio**0.3
    return least


KINDS = ["uniform", "normal", "half-normal", "laplace", "bimodal", "outliers", "both outliers", "negative", "gelu",
         "far from zero"]  # fmt: skip


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [EIGHT, FOUR, unsigned(3)], ids=["8", "4", "3"])
def test_distance_is_within_two_percent_of_brute_force(kind, grid, power):
    x = samples(kind)
    low, high = Distance(power)(stats_of(x), grid)
    assert error(x, low, high, grid, power) <= 1.02 * brute_force(x, grid, power)


@pytest.mark.parametrize("kind", ["normal", "negative", "both outliers"])
@pytest.mark.parametrize("bits", [8, 4])
def test_distance_on_symmetric_grids(kind, bits):
    x, grid = samples(kind), Grid(bits)
    low, high = Distance(2)(stats_of(x), grid)
    assert low == -high
    assert error(x, low, high, grid, 2) <= 1.02 * brute_force(x, grid, 2)


@pytest.mark.parametrize("grid", [EIGHT, FOUR], ids=["8", "4"])
def test_mae_ignores_how_far_outliers_are_and_mse_does_not(grid):
    bulk = np.abs(np.random.default_rng(0).normal(size=200_000)).astype(np.float32)
    highs = {
        rule: [RULES[rule](stats_of(np.concatenate([bulk, np.full(20, far)])), grid)[1] for far in (20, 60, 200)]
        for rule in ("mae", "mse")
    }
    assert max(highs["mae"]) < 1.3 * min(highs["mae"])
    assert max(highs["mae"]) < bulk.max()
    assert highs["mse"][2] > 0.9 * 200
    if grid is EIGHT:
        assert highs["mse"][0] > 0.9 * 20
        assert highs["mae"][0] == pytest.approx(3.35, rel=0.05)  # measured elsewhere
    else:
        assert highs["mse"][0] == pytest.approx(4.3, rel=0.1)
        assert highs["mae"][0] == pytest.approx(2.41, rel=0.05)


@pytest.mark.parametrize("zeros", [0, 600_000])
def test_a_step_may_be_narrower_than_a_bin(zeros):
    """An outlier makes the bins wide; the error within them is integrated, not taken at their centres."""
    normal = np.random.default_rng(1).normal(size=60_000)
    x = np.concatenate([normal, [400.0], np.zeros(zeros)]).astype(np.float32)
    stats = stats_of(x)
    low, high = Distance(1)(stats, EIGHT)
    assert (high - low) / 255 < 2 * stats.limit / len(stats.counts)
    assert error(x, low, high, EIGHT, 1) <= 1.05 * brute_force(x[:60_001], EIGHT, 1) * 60_001 / len(x)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("low", "high"), [(-1.0, 0.9), (-0.31, 0.05), (-0.01, 1.0), (0.0, 0.4), (-0.7, 0.0)])
def test_the_error_of_a_histogram_is_that_of_values_spread_over_its_bins(grid, power, low, high):
    counts = np.array([3.0, 1.0, 4.0, 7.0, 9.0, 2.0, 6.0, 5.0])
    stats = replace(stats_of([0.0, 1.0]), low=-0.95, high=0.85, limit=1.0, counts=counts)
    spread = (np.arange(2000) + 0.5) / 2000
    edges = np.clip(np.linspace(-1, 1, 9), stats.low, stats.high)
    scale, zero = grid.from_range(low, high)
    wanted = sum(
        count * np.mean(np.abs(x - fake_quantize(x, scale, zero, grid)).astype(np.float64) ** power)
        for at, count in enumerate(counts)
        if at not in (3, 4)  # the bins at zero
        for x in [np.float32(edges[at] + spread * (edges[at + 1] - edges[at]))]
    )
    found = Density(stats).error(np.array([low, -0.5]), np.array([high, 0.5]), grid, power)
    assert found[0] == pytest.approx(wanted, rel=2e-3)


@pytest.mark.parametrize("rule", ["mse", "mae", "entropy"])
def test_many_exact_zeros_change_nothing(rule):
    x = np.maximum(samples("normal", 40_000), 0) + samples("half-normal", 40_000)
    low, high = RULES[rule](stats_of(x), EIGHT)
    again = RULES[rule](stats_of(np.concatenate([x, np.zeros(100_000, np.float32)])), EIGHT)
    assert again == (pytest.approx(low, abs=0.01 * high), pytest.approx(high, rel=0.02))


@pytest.mark.parametrize("rule", ["mse", "mae", "entropy"])
def test_a_search_takes_milliseconds(rule):
    stats = stats_of(samples("laplace", 200_000))
    took = []
    for _ in range(5):
        start = time.perf_counter()
        RULES[rule](stats, EIGHT)
        took.append(time.perf_counter() - start)
    assert min(took) < 0.3  # 3 to 9 ms where nothing else runs


def test_minmax_and_averaged_minmax_are_exact():
    x = np.random.default_rng(3).normal(size=(50, 300)).astype(np.float32)
    stats = stats_of(x, rows=50)
    assert MinMax()(stats, EIGHT) == (x.min(), x.max())
    low, high = AveragedMinMax()(stats, EIGHT)
    assert low == pytest.approx(x.min(axis=1).mean(dtype=np.float64), rel=1e-6)
    assert high == pytest.approx(x.max(axis=1).mean(dtype=np.float64), rel=1e-6)


@pytest.mark.parametrize("keep", [50.0, 90.0, 99.0, 99.9, 99.99])
@pytest.mark.parametrize("kind", ["normal", "laplace", "half-normal", "bimodal"])
def test_percentile_is_the_quantile(kind, keep):
    x = samples(kind, 200_000)
    stats = stats_of(x)
    tail = (1 - keep / 100) / 2
    width = 2 * stats.limit / len(stats.counts)
    for found, share in zip(Percentile(keep)(stats, EIGHT), (tail, 1 - tail), strict=True):
        # between the order statistics next to the quantile, but for the place inside a bin
        below, above = np.quantile(x, np.clip([share - 1.5 / len(x), share + 1.5 / len(x)], 0, 1))
        assert below - width <= found <= above + width


def test_percentile_interpolates_within_a_bin():
    flat = replace(stats_of([0.0, 1.0]), low=-1.0, high=1.0, limit=1.0, counts=np.ones(4))
    assert Percentile(80.0)(flat, EIGHT) == (pytest.approx(-0.8), pytest.approx(0.8))
    assert Percentile(100.0)(flat, EIGHT) == (-1.0, 1.0)
    gap = replace(flat, counts=np.array([1.0, 0.0, 0.0, 1.0]))
    assert Percentile(50.0)(gap, EIGHT) == (pytest.approx(-0.75), pytest.approx(0.75))
    assert Percentile(99.0)(replace(flat, low=-0.9, high=0.2), EIGHT) == (-0.9, 0.2)


def test_entropy_clips_a_far_outlier_and_keeps_uniform_data_whole():
    far = np.concatenate([samples("normal", 100_000), [50.0]])
    low, high = Entropy()(stats_of(far), EIGHT)
    assert -5 < low < -3.5
    assert 3.5 < high < 10
    flat = samples("uniform", 100_000)
    assert Entropy()(stats_of(flat), EIGHT) == (pytest.approx(-1, abs=0.01), pytest.approx(2, abs=0.01))
    half = Entropy()(stats_of(np.abs(far)), EIGHT)
    assert half[0] == pytest.approx(0, abs=0.01)
    assert 3.5 < half[1] < 10


def test_entropy_cuts_a_short_tail_last():
    """GELU's negative side is short and full: cutting both sides by the same share would lose it."""
    x = np.concatenate([samples("gelu", 100_000), [80.0]])
    low, high = Entropy()(stats_of(x), EIGHT)
    assert low == pytest.approx(x.min(), rel=0.01)
    assert high < 20


def test_fewer_bits_clip_more():
    stats = stats_of(samples("laplace", 60_000))
    for rule in ("mse", "mae"):
        widths = [np.ptp(RULES[rule](stats, unsigned(bits))) for bits in (8, 6, 4, 2)]
        assert widths == sorted(widths, reverse=True)
        assert widths[-1] < 0.6 * widths[0]


VALUES = st.lists(st.floats(-1e5, 1e5, width=32), min_size=0, max_size=40)


@settings(max_examples=150, deadline=None)
@given(values=VALUES, rule=st.sampled_from(sorted(RULES)), grid=st.sampled_from(GRIDS))
def test_every_rule_stays_within_what_was_seen(values, rule, grid):
    stats = stats_of(values) if values else Histogram("x").stats()
    before = stats.counts.copy()
    low, high = RULES[rule](stats, grid)
    assert np.isfinite([low, high]).all()
    assert type(low) is type(high) is float
    assert low <= high
    bottom, top = min(stats.low, 0.0), max(stats.high, 0.0)
    if grid.symmetric and rule in ("mse", "mae"):
        bottom, top = -max(-bottom, top), max(-bottom, top)
    assert bottom <= low
    assert high <= top
    assert RULES[rule](stats, grid) == (low, high)
    np.testing.assert_array_equal(stats.counts, before)
    scale, _ = grid.from_range(low, high)
    assert scale > 0


@pytest.mark.parametrize("rule", sorted(RULES))
@pytest.mark.parametrize("value", [0.0, 5.0, -5.0, 1e-35, 1e30])
def test_constants_keep_their_value(rule, value):
    stats = stats_of(np.full(100, value))
    low, high = RULES[rule](stats, EIGHT)
    scale, zero = EIGHT.from_range(low, high)
    kept = fake_quantize(np.float32(value), scale, zero, EIGHT)
    assert kept == pytest.approx(value if abs(value) > 1e-30 else 0.0, rel=0.01)


def test_names():
    assert set(RULES) == {"minmax", "averaged", "percentile", "entropy", "mse", "mae"}
    assert RULES["mse"] == Distance(2)
    assert RULES["mae"] == Distance(1)
    assert RULES["percentile"] == Percentile(99.99)
