"""Range rules: from what calibration saw of a tensor to the float interval its grid covers.

A rule is a frozen dataclass; calling it with a tensor's statistics and a grid gives (low, high). Errors are computed
on the histogram, each bin standing for its centre.

MinMax             everything that was seen
AveragedMinMax     mean over samples of each sample's extremes (CalibTIP's initial ranges, arXiv 2006.10518)
Percentile         cuts a share of the values off either tail
Distance(2), MSE   least squared rounding error
Distance(1), MAE   least absolute rounding error: rare huge values do not own the grid (RepAPQ, arXiv 2402.16121)
Entropy            least Kullback-Leibler divergence between the histogram and its quantized version (Migacz,
                   "8-bit inference with TensorRT", GTC 2017; here with a zero point)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from onnxq.grid import Grid
from onnxq.types import TensorStats

Floats = npt.NDArray[np.float64]


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
        """Interpolated quantiles of the histogram, never outside the extremes."""
        if not stats.counts.any():
            return stats.low, stats.high
        tail = (1.0 - self.keep / 100.0) / 2.0
        share = np.concatenate([[0.0], np.cumsum(stats.counts) / stats.counts.sum()])
        edges = np.linspace(-stats.limit, stats.limit, len(stats.counts) + 1)
        first = int(np.searchsorted(share, tail, side="right")) - 1
        last = min(int(np.searchsorted(share, 1.0 - tail, side="left")), len(edges) - 1)
        low, high = float(edges[first]), float(edges[last])
        return max(low, stats.low), min(high, stats.high)


@dataclass(frozen=True)
class Distance:
    """Least mean |x - x_hat| ** power over clippings of the observed range.

    Attributes:
        power: 2 for the squared error, 1 for the absolute error.
        tries: Candidate clippings per side.
    """

    power: float = 2.0
    tries: int = 32

    def __call__(self, stats: TensorStats, grid: Grid) -> tuple[float, float]:
        """Search the upper end, then the lower end, then both once more (the error is nearly separable)."""
        centres, counts = _bins(stats)
        if not len(centres):
            return stats.low, stats.high
        low, high = min(stats.low, 0.0), max(stats.high, 0.0)
        if grid.symmetric:
            low = high = 0.0
            bound = max(-stats.low, stats.high)
            best = min(self._shrunk(bound), key=lambda b: self._error(centres, counts, -b, b, grid))
            return -best, best
        for _ in range(2 if low < 0 < high else 1):
            start = low
            if stats.high > 0:
                high = min(self._shrunk(stats.high), key=lambda h: self._error(centres, counts, start, h, grid))
            end = high
            if stats.low < 0:
                low = min(self._shrunk(stats.low), key=lambda v: self._error(centres, counts, v, end, grid))
        return low, high

    def _shrunk(self, bound: float) -> Iterator[float]:
        yield from (bound * share for share in np.geomspace(1.0, 0.02, 2 * self.tries))

    def _error(self, centres: Floats, counts: Floats, low: float, high: float, grid: Grid) -> float:
        scale, zero = grid.from_range(low, high)
        codes = np.clip(np.rint(centres / scale) + zero, grid.qmin, grid.qmax)
        gap = np.abs(centres - (codes - zero) * scale)
        return float((counts * (gap * gap if self.power == 2.0 else gap**self.power)).sum())


@dataclass(frozen=True)
class Entropy:
    """Least Kullback-Leibler divergence over clippings of the observed range.

    Attributes:
        tries: Candidate clippings.
    """

    tries: int = 64

    def __call__(self, stats: TensorStats, grid: Grid) -> tuple[float, float]:
        """Both ends are clipped by the same share."""
        centres, counts = _bins(stats)
        low, high = min(stats.low, 0.0), max(stats.high, 0.0)
        if not len(centres) or low == high:
            return stats.low, stats.high
        shares = np.linspace(1.0, 0.05, self.tries)
        best = min(shares, key=lambda share: _divergence(centres, counts, low * share, high * share, grid))
        return float(low * best), float(high * best)


def _divergence(centres: Floats, counts: Floats, low: float, high: float, grid: Grid) -> float:
    """KL(P || Q): P is the clipped histogram, Q spreads each code's mass evenly over the code's occupied bins.

    The mass outside the range is added to P's outermost bins but not to Q's, so clipping costs divergence.
    """
    scale, zero = grid.from_range(low, high)
    inside = (centres >= low) & (centres <= high)
    if inside.sum() < 2:
        return np.inf
    kept = counts[inside]
    clipped = kept.copy()
    clipped[0] += counts[centres < low].sum()
    clipped[-1] += counts[centres > high].sum()
    codes = (np.clip(np.rint(centres[inside] / scale) + zero, grid.qmin, grid.qmax) - grid.qmin).astype(np.int64)
    occupied = kept > 0
    mass = np.bincount(codes, weights=kept, minlength=grid.qmax - grid.qmin + 1)
    width = np.bincount(codes, weights=occupied, minlength=grid.qmax - grid.qmin + 1)
    spread = np.where(occupied, mass[codes] / np.maximum(width[codes], 1.0), 0.0)
    p, q = clipped / clipped.sum(), spread / max(spread.sum(), 1e-30)
    used = p > 0
    return float((p[used] * np.log(p[used] / np.maximum(q[used], 1e-12))).sum())


def _bins(stats: TensorStats) -> tuple[Floats, Floats]:
    """Centres and counts of the occupied bins, the outermost moved to the exact extremes."""
    used = np.flatnonzero(stats.counts)
    if not len(used):
        return np.zeros(0), np.zeros(0)
    width = 2.0 * stats.limit / len(stats.counts)
    centres = -stats.limit + (used + 0.5) * width
    return np.clip(centres, stats.low, stats.high), stats.counts[used]


RULES: Mapping[str, RangeRule] = {
    "minmax": MinMax(),
    "averaged": AveragedMinMax(),
    "percentile": Percentile(),
    "entropy": Entropy(),
    "mse": Distance(2.0),
    "mae": Distance(1.0),
}
"""Rules by the name that recipes and the command line use."""
