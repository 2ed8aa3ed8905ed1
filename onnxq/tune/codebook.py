"""Codebooks: weights that take at most 2^bits different values, 1 to 4 bits per weight.

The values are chosen for least squared error (k-means in one dimension), per output channel or for the whole weight.
Both lie on the int8 grid of the weight: values are rounded to multiples of the step max |w| / 127, equal codes are
counted, and the best at most 2^bits of the 255 codes are found exactly by dynamic programming over the sorted codes:

    cost[m][j] = least squared error of the codes up to j with m values = min over i of cost[m - 1][i] + error(i, j)

where error(i, j) is that of one value for all codes between, its mean rounded to an integer. As that stays an int8
weight, a `LearnedLayer` carries it; only fewer codes occur. Rounding moves a value by half a step at most, which is
small against the distance of the values.

X. Wu, "Optimal quantization by matrix searching", J. Algorithms 12 (1991) for k-means in one dimension; codebooks
for weights: S. Han et al., "Deep Compression", arXiv 1510.00149.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq.errors import UsageError
from onnxq.grid import SMALLEST_SCALE
from onnxq.types import LearnedLayer, WeightGrid

LARGEST_CODE = 127
BITS = (1, 2, 3, 4)
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Codebook:
    """A weight of few values.

    Attributes:
        codes: int8 [the weight's shape]; at most 2^bits different ones, per channel where `grid` has an axis.
        grid: Its int8 steps.
        bits: Of an index into the values.
    """

    codes: npt.NDArray[np.int8]
    grid: WeightGrid
    bits: int

    def learned(self, bias: npt.NDArray[np.float32] | None = None) -> LearnedLayer:
        """As codes for a plan whose grid for the layer is `grid`."""
        return LearnedLayer(self.codes, bias)

    def values(self) -> npt.NDArray[np.float32]:
        """The weight, float32, as its codes stand for it."""
        scales = np.asarray(self.grid.scales, np.float32)
        if self.grid.axis is not None:
            scales = scales.reshape([-1 if axis == self.grid.axis else 1 for axis in range(self.codes.ndim)])
        result: npt.NDArray[np.float32] = self.codes.astype(np.float32) * scales
        return result


def codebook(weight: npt.NDArray[np.float32], bits: int, axis: int | None = None) -> Codebook:
    """The at most 2^bits values on the int8 grid that stand for `weight` with the least squared error.

    Args:
        weight: Float weight of any rank, finite.
        bits: 1 to 4.
        axis: The kept axis: a codebook and a step per channel; None for one for the whole weight.

    Raises:
        UsageError: `bits` is not 1 to 4.
    """
    if bits not in BITS:
        raise UsageError(f"a codebook has 1 to 4 bits per weight, not {bits}")
    rows = weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    scales = np.maximum(np.abs(rows).max(axis=1) / np.float32(LARGEST_CODE), np.float32(SMALLEST_SCALE))
    codes = np.stack([_row(row / scale, 2**bits) for row, scale in zip(rows, scales, strict=True)])
    if axis is None:
        shaped = codes.reshape(weight.shape)
    else:
        moved = np.moveaxis(weight, axis, 0).shape
        shaped = np.ascontiguousarray(np.moveaxis(codes.reshape(moved), 0, axis))
    return Codebook(shaped, WeightGrid(tuple(map(float, scales)), axis), bits)


def _row(units: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int8]:
    """Codes of one row of weights in steps; at most `count` different ones."""
    bins = np.clip(np.rint(units), -LARGEST_CODE, LARGEST_CODE).astype(np.int64) + LARGEST_CODE
    size = 2 * LARGEST_CODE + 1
    values = units.astype(np.float64)
    seen = np.unique(bins)
    powers = (np.bincount(bins, values**power, size)[seen] for power in (0, 1, 2))
    number, first, second = (np.concatenate([[0.0], np.cumsum(power)]) for power in powers)
    table = np.zeros(size, np.int8)
    table[seen] = _centres(number, first, second, count)
    return table[bins]


def _centres(number: Floats, first: Floats, second: Floats, count: int) -> npt.NDArray[np.int8]:
    """The code of every bin, from cumulative sums over the bins of 1, w and w^2 (a zero in front)."""
    bins = len(number) - 1
    # error[i, j]: of bins i to j - 1 standing for one integer; infinite where j <= i
    sizes = number[None, :] - number[:, None]
    totals = first[None, :] - first[:, None]
    inside = sizes > 0
    centre = np.clip(np.rint(totals / np.where(inside, sizes, 1.0)), -LARGEST_CODE, LARGEST_CODE)
    error = (second[None, :] - second[:, None]) - 2 * centre * totals + centre**2 * sizes
    error = np.where(inside, error, np.inf)
    cost = error[0].copy()
    cost[0] = 0.0
    choices = []
    for _ in range(min(count, bins) - 1):
        trial = cost[:, None] + error
        best = trial.argmin(axis=0)
        lower = trial[best, np.arange(bins + 1)]
        keep = cost <= lower
        choices.append(np.where(keep, -1, best))
        cost = np.where(keep, cost, lower)
    codes = np.zeros(bins, np.int8)
    end = bins
    for choice in reversed(choices):
        start = int(choice[end])
        if start >= 0:
            codes[start:end] = centre[start, end]
            end = start
    codes[:end] = centre[0, end]
    return codes
