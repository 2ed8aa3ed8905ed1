"""Range rules: from what calibration saw of a tensor to the float interval its grid covers.

A rule is a frozen dataclass; calling it with a tensor's statistics and a grid gives (low, high), which lies within
the extremes and 0 (every grid holds 0 anyway).

MinMax             everything that was seen
AveragedMinMax     mean over samples of each sample's extremes (CalibTIP's initial ranges, arXiv 2006.10518)
Percentile         cuts a share of the values off either tail
Distance(2), MSE   least squared rounding error
Distance(1), MAE   least absolute rounding error: rare huge values do not own the grid (RepAPQ, arXiv 2402.16121)
Entropy            least Kullback-Leibler divergence between the histogram and its quantized version (Migacz,
                   "8-bit inference with TensorRT", GTC 2017; here with a zero point)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from onnxq.calibrate.density import Density
from onnxq.errors import UsageError
from onnxq.grid import Grid
from onnxq.types import TensorStats

Floats = npt.NDArray[np.float64]
NARROWEST = 1e-3
"""No search clips an end to less than this share of it."""
LOOKUPS = 1 << 15
"""Codes whose errors the first round of a search by distance may look up."""


class RangeRule(Protocol):
    """Anything that turns statistics into a range."""

    def __call__(self, stats: TensorStats, grid: Grid) -> tuple[float, float]:
        """(low, high) of the clipped float interval."""
        ...


@dataclass(frozen=True)
class MinMax:
    """Everything that was seen."""

    def __call__(self, stats: TensorStats, grid: Grid) -> tuple[float, float]:
        """Smallest and largest value."""
        return stats.low, stats.high


@dataclass(frozen=True)
class AveragedMinMax:
    """The mean over samples of each sample's smallest and largest value."""

    def __call__(self, stats: TensorStats, grid: Grid) -> tuple[float, float]:
        """The averaged extremes."""
        return stats.mean_low, stats.mean_high


@dataclass(frozen=True)
class Percentile:
    """Leave out the outermost values of either side.

    Attributes:
        keep: Percentage of the values between the lower end and the upper end, 50 to 100.
    """

    keep: float = 99.99

    def __call__(self, stats: TensorStats, grid: Grid) -> tuple[float, float]:
        """Quantiles of the histogram, interpolated within its bins."""
        tail = (1.0 - self.keep / 100.0) / 2.0
        return _quantile(stats, tail), _quantile(stats, 1.0 - tail)


def _quantile(stats: TensorStats, share: float) -> float:
    used = np.flatnonzero(stats.counts)
    if not len(used):
        return stats.low
    filled = np.cumsum(stats.counts[used])
    wanted = share * filled[-1]
    at = min(int(np.searchsorted(filled, wanted)), len(used) - 1)
    count = stats.counts[used[at]]
    part = float(np.clip((wanted - filled[at] + count) / count, 0.0, 1.0))
    value = stats.limit * (2.0 * (float(used[at]) + part) / len(stats.counts) - 1.0)
    return min(max(value, stats.low), stats.high)


@dataclass(frozen=True)
class Distance:
    """Least mean |x - x_hat| ** power over clippings of the observed range.

    Attributes:
        power: 2 for the squared error, 1 for the absolute error.
        rounds: How often the search zooms in on the best clipping so far.
    """

    power: Literal[1, 2] = 2
    rounds: int = 6

    def __call__(self, stats: TensorStats, grid: Grid) -> tuple[float, float]:
        """Search both ends together: coarsely over three decades, then in ever smaller neighbourhoods."""
        low, high = min(stats.low, 0.0), max(stats.high, 0.0)
        if grid.symmetric:
            low, high = -max(-low, high), max(-low, high)
        density = Density(stats)
        sides = 1 if grid.symmetric or low == 0.0 or high == 0.0 else 2
        tries = int(np.clip((LOOKUPS / (1 << grid.bits)) ** (1.0 / sides), 11, 48))
        factors = np.geomspace(1.0, NARROWEST, tries)
        ratio = factors[0] / factors[1]
        best = np.ones(2)
        for _ in range(1 + self.rounds):
            pairs = np.stack([factors, factors]) if sides == 1 else _pairs(factors)
            shares = np.clip(best[:, None] * pairs, NARROWEST, 1.0)
            best = shares[:, np.argmin(density.error(low * shares[0], high * shares[1], grid, self.power))]
            factors = ratio ** np.linspace(-1.0, 1.0, 5)
            ratio = ratio**0.5
        return float(low * best[0]), float(high * best[1])


def _pairs(values: Floats) -> Floats:
    """All ordered pairs, as two rows."""
    return np.stack([np.repeat(values, len(values)), np.tile(values, len(values))])


@dataclass(frozen=True)
class Entropy:
    """Least Kullback-Leibler divergence over cuts of everything beyond +-t.

    Attributes:
        tries: Candidates for t, over two decades.
    """

    tries: int = 64

    def __call__(self, stats: TensorStats, grid: Grid) -> tuple[float, float]:
        """Values in the two bins at zero are left out: every grid holds them, and there are often many."""
        middle = len(stats.counts) // 2
        used = np.flatnonzero(stats.counts)
        used = used[(used < middle - 1) | (used > middle)]
        if len(used) < 2:
            return stats.low, stats.high
        centres = stats.limit * ((2.0 * used + 1.0) / len(stats.counts) - 1.0)
        counts = stats.counts[used]
        bounds = max(-stats.low, stats.high) * np.geomspace(1.0, 0.01, self.tries)
        ranges = [(max(stats.low, -bound), min(stats.high, bound)) for bound in bounds.tolist()]
        return min(ranges, key=lambda ends: _divergence(centres, counts, ends, grid))


def _divergence(centres: Floats, counts: Floats, ends: tuple[float, float], grid: Grid) -> float:
    """KL(P || Q): P is the clipped histogram, Q spreads each code's mass evenly over the code's occupied bins.

    The mass outside the range is added to P's outermost bins but not to Q's, so clipping costs divergence.
    """
    first, last = np.searchsorted(centres, ends)
    if last - first < 2:
        return np.inf
    kept = counts[first:last]
    clipped = kept.copy()
    clipped[0] += counts[:first].sum()
    clipped[-1] += counts[last:].sum()
    scale, zero = grid.from_range(*ends)
    codes = (np.clip(np.rint(centres[first:last] / scale) + zero, grid.qmin, grid.qmax) - grid.qmin).astype(np.int64)
    spread = (np.bincount(codes, weights=kept) / np.maximum(np.bincount(codes), 1))[codes]
    p, q = clipped / clipped.sum(), spread / spread.sum()
    return float((p * np.log(p / q)).sum())


RULES: dict[str, RangeRule] = {
    "minmax": MinMax(),
    "averaged": AveragedMinMax(),
    "percentile": Percentile(),
    "entropy": Entropy(),
    "mse": Distance(2),
    "mae": Distance(1),
}
"""Rules by the name that recipes and the command line use; `register_rule` adds to them."""
OWN_RULES = frozenset(RULES)


def register_rule(name: str, rule: RangeRule) -> None:
    """Make a rule of one's own known to recipes: `ranges = "NAME"`.

    Args:
        name: Replaces an earlier rule of that name, but none of the package's own.
        rule: Called with what calibration saw of a tensor and with the tensor's grid; gives (low, high), which lies
            within the values seen and 0.

    Raises:
        UsageError: The name is one of the package's own.
    """
    if name in OWN_RULES or name == "auto":
        raise UsageError(f"the range rule {name!r} is one of onnxq's own; take another name.")
    RULES[name] = rule
