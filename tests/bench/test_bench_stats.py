import math

import numpy as np
import pytest

from onnxq.bench import mcnemar, ratio_interval, wilson


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
