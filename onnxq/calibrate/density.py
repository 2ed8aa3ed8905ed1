"""The rounding error of a grid on a histogram, exact for values spread evenly within each bin.

With M_k(t) the sum of x ** k over the values below t, the error of the values in a cell [a, b) of the code v is
M_2 - 2 v M_1 + v ** 2 M_0 (squared), or M_1 - v M_0 on either side of v (absolute), each M taken from a to b. The
moments are cumulative sums over the bins, so that a grid costs as many look-ups as it has codes, however many bins
there are, and a step may be narrower than a bin.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxq.grid import SMALLEST_SCALE, Grid
from onnxq.types import TensorStats

Floats = npt.NDArray[np.float64]


class Density:
    """The values of a histogram but those of the two bins at zero, which every grid holds.

    Args:
        stats: The outermost bins end at its extremes.
    """

    def __init__(self, stats: TensorStats) -> None:
        bins = len(stats.counts)
        self._middle = bins / 2.0
        self._bins_per_unit = self._middle / stats.limit if stats.limit else 0.0
        self._counts = stats.counts.copy()
        self._counts[bins // 2 - 1 : bins // 2 + 1] = 0.0
        edges = np.clip(np.linspace(-stats.limit, stats.limit, bins + 1), stats.low, stats.high)
        self._start, self._stop = edges[:-1], edges[1:]
        self._width = np.maximum(self._stop - self._start, 1e-300)
        self._sums = [
            np.concatenate([[0.0], np.cumsum(self._counts * mean)]) for mean in _means(self._start, self._stop, 2)
        ]

    def error(self, lows: Floats, highs: Floats, grid: Grid, power: Literal[1, 2]) -> Floats:
        """Sum of |x - x_hat| ** power for each range [low, high]."""
        steps, zeros = _grids(lows, highs, grid)
        codes = (np.arange(grid.qmin, grid.qmax + 1) - zeros[:, None]) * steps[:, None]
        ends = codes[:, :-1] + steps[:, None] / 2.0
        if power == 2:
            count, first, second = self._cells(ends, 2)
            return np.asarray((second - codes * (2.0 * first - codes * count)).sum(axis=1))
        halves = np.repeat(codes, 2, axis=1)
        between = halves[:, 1:].copy()
        between[:, 1::2] = ends
        count, first = self._cells(between, 1)
        return np.asarray(np.abs(first - halves * count).sum(axis=1))

    def _cells(self, ends: Floats, order: int) -> list[Floats]:
        """Moments 0 to `order` of the cells that `ends` [ranges, ends] separate."""
        places = ends * self._bins_per_unit + self._middle
        bins = np.clip(places, 0, len(self._counts) - 1, out=places).astype(np.int64)
        start = self._start[bins]
        inside = np.clip(ends, start, self._stop[bins])
        count = self._counts[bins] * (inside - start) / self._width[bins]
        return [
            np.diff(sums[bins] + count * mean, axis=1, prepend=0.0, append=sums[-1])
            for sums, mean in zip(self._sums, _means(start, inside, order), strict=False)
        ]


def _means(a: Floats, b: Floats, order: int) -> list[Floats]:
    """Means of x ** 0 to x ** `order` over [a, b]."""
    found = [np.ones(1), (a + b) / 2.0]
    return found if order == 1 else [*found, (a * a + a * b + b * b) / 3.0]


def _grids(lows: Floats, highs: Floats, grid: Grid) -> tuple[Floats, Floats]:
    """What `Grid.from_range` gives, for many ranges and up to float32 rounding."""
    if grid.symmetric:
        steps = np.maximum(np.maximum(highs, -lows) / grid.qmax, SMALLEST_SCALE)
        return steps, np.zeros_like(steps)
    low, high = np.minimum(lows, 0.0), np.maximum(highs, 0.0)
    steps = np.maximum((high - low) / (grid.qmax - grid.qmin), SMALLEST_SCALE)
    return steps, np.clip(np.rint(grid.qmin - low / steps), grid.qmin, grid.qmax)
