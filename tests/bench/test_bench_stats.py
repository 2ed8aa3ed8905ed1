import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from onnxq.bench import difference, mcnemar, paired, ratio_interval, wilson


def test_ratio_is_the_median_of_paired_ratios_not_the_ratio_of_medians():
    # The machine is ten times slower in half of the rounds; the second model always takes 0.8 of the first.
    reference = np.tile([1.0, 10.0], 20)
    found = ratio_interval(0.8 * reference, reference)
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.8, 0.8))


def test_ratio_interval_holds_the_truth_and_shrinks_with_rounds():
    rng = np.random.default_rng(3)

    def measured(rounds):
        reference = rng.uniform(1.0, 2.0, rounds)
        return ratio_interval(reference * 0.6 * rng.lognormal(0.0, 0.1, rounds), reference, seed=1)

    few, many = measured(30), measured(3000)
    assert few.low < 0.6 < few.high
    assert many.low < 0.6 < many.high
    assert few.low <= few.value <= few.high
    assert few.high - few.low > 4 * (many.high - many.low)


def test_ratio_interval_is_as_wide_as_the_spread_of_medians():
    # The standard error of the median of n values of a normal distribution is sigma * sqrt(pi / 2n).
    rng = np.random.default_rng(0)
    found = [ratio_interval(rng.normal(1.0, 0.1, 400), np.ones(400), seed) for seed in range(30)]
    width = np.mean([interval.high - interval.low for interval in found])
    assert width == pytest.approx(2 * 1.96 * 0.1 * math.sqrt(math.pi / 800), rel=0.08)


def test_ratio_interval_is_wider_when_noise_comes_in_bursts():
    rng = np.random.default_rng(0)
    noise = rng.lognormal(0.0, 0.3, 40)
    bursts = ratio_interval(np.repeat(noise, 25), np.ones(1000))
    shuffled = ratio_interval(rng.permutation(np.repeat(noise, 25)), np.ones(1000))
    assert bursts.high - bursts.low > 1.5 * (shuffled.high - shuffled.low)


def test_bootstrap_is_determined_by_its_seed():
    times = np.random.default_rng(0).uniform(1.0, 2.0, 50)
    ones = np.ones(50)
    assert ratio_interval(times, ones, seed=5) == ratio_interval(times, ones, seed=5)
    assert ratio_interval(times, ones, seed=5) != ratio_interval(times, ones, seed=6)


def test_one_round_has_no_spread():
    found = ratio_interval([3.0], [2.0])
    assert (found.value, found.low, found.high) == (1.5, 1.5, 1.5)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(8, 10, 0.4902, 0.9433), (50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)],
)
def test_wilson_interval(successes, trials, low, high):
    found = wilson(successes, trials)
    assert found.value == successes / trials
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_wilson_of_nothing_knows_nothing():
    found = wilson(0, 0)
    assert (found.low, found.high) == (0.0, 1.0)


def rows(both, first, second, neither):
    a = [True] * (both + first) + [False] * (second + neither)
    b = [True] * both + [False] * first + [True] * second + [False] * neither
    return a, b


@pytest.mark.parametrize(
    ("first", "second", "p"),
    [(1, 9, 22 / 1024), (9, 1, 22 / 1024), (5, 5, 1.0), (0, 6, 2 / 64), (0, 0, 1.0), (3, 4, 1.0)],
)
def test_mcnemar_is_the_exact_binomial_test_of_the_rows_that_differ(first, second, p):
    assert mcnemar(*rows(40, first, second, 7)) == pytest.approx(p)


def test_mcnemar_of_many_rows():
    # Normal approximation with continuity correction: z = (|5200 - 4800| - 1) / sqrt(10000) = 3.99.
    p = mcnemar(*rows(0, 5200, 4800, 0))
    assert p == pytest.approx(math.erfc(3.99 / math.sqrt(2)), rel=0.02)


def test_mcnemar_refuses_unpaired_rows():
    with pytest.raises(ValueError, match="3 and 2 rows"):
        mcnemar([True, True, False], [True, True])


@settings(max_examples=40, deadline=None)
@given(first=st.integers(0, 60), second=st.integers(0, 60))
def test_mcnemar_is_the_sum_of_all_splits_as_rare(first, second):
    rare = sum(
        math.comb(first + second, k)
        for k in range(first + second + 1)
        if abs(2 * k - first - second) >= abs(first - second)
    )
    assert mcnemar(*rows(3, first, second, 1)) == pytest.approx(rare / 2 ** (first + second), rel=1e-12)


@settings(max_examples=40, deadline=None)
@given(trials=st.integers(1, 400), data=st.data())
def test_wilson_is_scipys(trials, data):
    successes = data.draw(st.integers(0, trials))
    found, other = wilson(successes, trials), binomtest(successes, trials).proportion_ci(0.95, "wilson")
    assert (found.low, found.high) == pytest.approx((other.low, other.high), abs=1e-9)


@pytest.mark.parametrize(
    ("counts", "low", "high"),
    [((36, 12, 2, 0), 0.0569, 0.3404), ((1, 97, 1, 1), 0.8737, 0.9850), ((0, 30, 0, 0), 0.8395, 1.0)],
)
def test_the_interval_of_a_difference_is_newcombes(counts, low, high):
    found = difference(*counts)
    assert found.value == pytest.approx((counts[1] - counts[2]) / sum(counts))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    both, first, second, neither = counts
    turned = difference(both, second, first, neither)
    assert (turned.low, turned.value, turned.high) == pytest.approx((-found.high, -found.value, -found.low))


@pytest.mark.parametrize(
    ("counts", "phi"),
    [((40, 5, 2, 13), 480 / math.sqrt(45 * 15 * 42 * 18)), ((10, 3, 2, 1), 0.0), ((8, 6, 5, 1), -22 / math.sqrt(7644))],
)
def test_a_positive_correlation_counts_half_a_row_less(counts, phi):
    both, first, second, _ = counts
    one, other = (binomtest(both + only, sum(counts)) for only in (first, second))
    (l1, u1), (l2, u2) = ((ends.low, ends.high) for ends in (t.proportion_ci(0.95, "wilson") for t in (one, other)))
    p1, p2 = one.statistic, other.statistic
    low = p1 - p2 - math.sqrt((p1 - l1) ** 2 - 2 * phi * (p1 - l1) * (u2 - p2) + (u2 - p2) ** 2)
    high = p1 - p2 + math.sqrt((u1 - p1) ** 2 - 2 * phi * (u1 - p1) * (p2 - l2) + (p2 - l2) ** 2)
    found = difference(*counts)
    assert (found.low, found.high) == pytest.approx((low, high), abs=1e-9)


@pytest.mark.parametrize("chances", [(0.85, 0.05, 0.05, 0.05), (0.7, 0.12, 0.03, 0.15), (0.95, 0.0, 0.02, 0.03)])
def test_the_interval_of_a_difference_holds_the_truth_in_95_of_100_cases(chances):
    rng = np.random.default_rng(1)
    truth, held = chances[1] - chances[2], 0
    for counts in rng.multinomial(120, chances, 1500):
        found = difference(*(int(count) for count in counts))
        held += found.low <= truth <= found.high
    assert 0.93 <= held / 1500 <= (0.985 if chances[1] else 1.0)  # with few rows that differ it is too careful


def test_a_difference_of_nothing_knows_nothing():
    assert difference(0, 0, 0, 0) == type(wilson(0, 0))(0.0, -1.0, 1.0)
    assert difference(8, 0, 0, 0).value == 0.0
    assert difference(8, 0, 0, 0).low < -0.2


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        ((90, 6, 0, 4), "6.00 points better (95 % CI "),
        ((90, 0, 6, 4), "6.00 points WORSE (95 % CI "),
        ((90, 5, 0, 5), "inside the noise (+5.00 points, 95 % CI "),
        ((90, 1, 4, 5), "inside the noise (-3.00 points, 95 % CI "),
    ],
)
def test_a_difference_is_one_from_six_rows_to_none(counts, said):
    found = paired(*rows(*counts))
    assert found.words.startswith(said)
    assert f"{counts[1]} rows gained, {counts[2]} lost, McNemar p = {found.p_value:.2g})" in found.words
    assert (found.gained, found.lost) == counts[1:3]
    assert found.p_value == mcnemar(*rows(*counts)) == min(1, 2 * binom.cdf(min(counts[1:3]), sum(counts[1:3]), 0.5))
