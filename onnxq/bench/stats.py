"""Intervals and tests. numpy only; everything random takes a seed.

paired ratio    r_i = t_i / t0_i of round i; the estimate is median(r), its interval the 2.5 % and 97.5 %
                quantiles of the median over resampled rounds. Rounds are resampled in runs of n^(1/3)
                neighbours, because load on a shared machine comes in bursts: neighbours are dependent.
two runs        median(a) / median(b) of independent samples; both are resampled in the same way
proportion      Wilson's interval: (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
McNemar         of the n rows on which exactly one of two models is right, the number that the first wins
                is Binomial(n, 1/2) when both are equally good
difference      of two such shares, p1 - p2, of the same rows (Newcombe, "Improved confidence intervals for the
                difference between binomial proportions based on paired data", Statistics in Medicine 17, 1998,
                method 10): with Wilson's ends l and u of both and the correlation phi of the two,

                    p1 - p2 - sqrt((p1 - l1)^2 - 2 phi (p1 - l1)(u2 - p2) + (u2 - p2)^2)
                    p1 - p2 + sqrt((u1 - p1)^2 - 2 phi (u1 - p1)(p2 - l2) + (p2 - l2)^2)
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from onnxq.types import Interval, Paired

Z95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""
RESAMPLES = 1000


def ratio_interval(times: npt.ArrayLike, reference: npt.ArrayLike, seed: int = 0) -> Interval:
    """Median of `times / reference`, round by round, with a bootstrap 95 % interval.

    Args:
        times: One time per round.
        reference: Time of the other model in the same rounds.
        seed: Of the bootstrap.
    """
    ratios = np.asarray(times, np.float64) / np.asarray(reference, np.float64)
    low, high = np.quantile(_medians(ratios, np.random.default_rng(seed)), (0.025, 0.975))
    return Interval(float(np.median(ratios)), float(low), float(high))


def change_interval(now: npt.ArrayLike, then: npt.ArrayLike, seed: int = 0) -> Interval:
    """Ratio of the medians of two independent samples, with a bootstrap 95 % interval.

    Args:
        now: One figure per round.
        then: The same of another run, of any length.
        seed: Of the bootstrap.
    """
    new, old = np.asarray(now, np.float64), np.asarray(then, np.float64)
    rng = np.random.default_rng(seed)
    low, high = np.quantile(_medians(new, rng) / _medians(old, rng), (0.025, 0.975))
    return Interval(float(np.median(new) / np.median(old)), float(low), float(high))


def _medians(values: npt.NDArray[np.float64], rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Medians of `RESAMPLES` resamplings of rounds, in runs of neighbours."""
    rounds = len(values)
    run = max(1, round(rounds ** (1 / 3)))
    wrapped = np.concatenate([values, values[:run]])
    offsets = np.arange(run)
    medians = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        starts = rng.integers(0, rounds, -(-rounds // run))
        medians[index] = np.median(wrapped[starts[:, None] + offsets].ravel()[:rounds])
    return medians


def wilson(successes: int, trials: int) -> Interval:
    """Share `successes / trials` with Wilson's 95 % interval; (0, 0, 1) of no trials at all."""
    if trials == 0:
        return Interval(0.0, 0.0, 1.0)
    share, z2 = successes / trials, Z95 * Z95
    centre = share + z2 / (2 * trials)
    half = Z95 * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    scale = 1 + z2 / trials
    low = 0.0 if successes == 0 else (centre - half) / scale
    high = 1.0 if successes == trials else (centre + half) / scale
    return Interval(share, low, high)


def mcnemar(a_correct: npt.ArrayLike, b_correct: npt.ArrayLike) -> float:
    """Two-sided exact p-value that two models, judged on the same rows, are equally often right.

    Args:
        a_correct: Per row, whether the first model is right.
        b_correct: The same of the second.

    Raises:
        ValueError: The two do not have the same number of rows.
    """
    _, wins, losses, _ = _counts(a_correct, b_correct)
    return _sign_test(wins, losses)


def paired(a_correct: npt.ArrayLike, b_correct: npt.ArrayLike) -> Paired:
    """A model against a reference, both judged on the same rows; arguments and refusals as of `mcnemar`."""
    both, gained, lost, neither = _counts(a_correct, b_correct)
    return Paired(gained, lost, difference(both, gained, lost, neither), _sign_test(gained, lost))


def difference(both: int, first: int, second: int, neither: int) -> Interval:
    """Share of rows that the first of two models gets right, minus the second's, with its 95 % interval.

    Args:
        both: Rows that both get right.
        first: Rows that only the first gets right.
        second: Rows that only the second gets right.
        neither: Rows that none gets right.
    """
    rows = both + first + second + neither
    if not rows:
        return Interval(0.0, -1.0, 1.0)
    one, other = wilson(both + first, rows), wilson(both + second, rows)
    phi = _correlation(both, first, second, neither)
    value = (first - second) / rows

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    low = value - reach(one.value - one.low, other.high - other.value)
    high = value + reach(one.high - one.value, other.value - other.low)
    return Interval(value, low, high)


def _correlation(both: int, first: int, second: int, neither: int) -> float:
    """Of two yes-or-no variables; drawn towards 0 by half a row where it is positive."""
    sums = (both + first) * (second + neither) * (both + second) * (first + neither)
    if not sums:
        return 0.0
    product = float(both * neither - first * second)
    if product > 0:
        product = max(product - (both + first + second + neither) / 2, 0.0)
    return product / math.sqrt(sums)


def _counts(a_correct: npt.ArrayLike, b_correct: npt.ArrayLike) -> tuple[int, int, int, int]:
    """Rows that both, only the first, only the second, and none is right on."""
    a, b = np.asarray(a_correct, bool), np.asarray(b_correct, bool)
    if a.shape != b.shape:
        raise ValueError(f"{a.size} and {b.size} rows cannot be paired")
    return int(np.sum(a & b)), int(np.sum(a & ~b)), int(np.sum(~a & b)), int(np.sum(~a & ~b))


def _sign_test(wins: int, losses: int) -> float:
    """Chance of a split as uneven as this one, or more, of rows that go either way alike."""
    trials = wins + losses
    ways, tail = 1, 1
    for k in range(min(wins, losses)):
        ways = ways * (trials - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / (1 << trials))
