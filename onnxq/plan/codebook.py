"""Codebooks: weights that take at most 2^bits different values, 1 to 4 bits per weight.

The values are chosen for least squared error (k-means in one dimension), per output channel or for the whole weight.
They lie on the int8 grid of the weight, whose steps are max |w| / 127 per channel: weights are rounded to codes, equal
codes are counted, and the best at most 2^bits of the 255 codes are found exactly by dynamic programming over the
sorted codes:

    cost[m][j] = least squared error of the codes up to j with m values = min over i of cost[m - 1][i] + error(i, j)

where error(i, j) is that of one value for all codes between, its mean rounded to an integer. So the result is an int8
weight in which few codes occur. Rounding moves a value by half a step at most, which is small against the distance of
the values. Where channels with different steps share a codebook, a weight counts as the square of its channel's step.

A codebook per channel is nearer to the weights, and takes 2^bits bytes of the file per channel. Channels of few weights
do not earn that; their codebook is that of the whole weight. Where channels have fewer than 32 weights, as in depthwise
convolutions, nothing is gained at all: such layers are a small part of a file and a large part of the error.

X. Wu, "Optimal quantization by matrix searching", J. Algorithms 12 (1991) for k-means in one dimension; codebooks
for weights: S. Han et al., "Deep Compression", arXiv 1510.00149.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxq.errors import UsageError
from onnxq.grid import Grid
from onnxq.plan.weights import absmax, room_for_bias
from onnxq.types import WeightGrid

BITS = (1, 2, 3, 4)
SHORT = 32
"""Weights of a channel below which a layer keeps its int8 codes, unless it is asked for by name."""
SHARE = 0.25
"""Most bytes of a channel's own codebook, of those of its indices."""
Floats = npt.NDArray[np.float64]


def short(weight: npt.NDArray[np.float32], axis: int) -> bool:
    """Whether the channels along `axis` have too few weights for codebooks to be worth it."""
    return bool(weight.size < SHORT * weight.shape[axis])


def codebook_grid(
    weight: npt.NDArray[np.float32],
    bias: npt.NDArray[np.float32] | None,
    bits: int,
    axis: int | None,
    input_scale: float,
    *,
    widest: int = 8,
) -> WeightGrid:
    """The grid of a weight in codebooks, with a step per channel.

    Args:
        weight: Float weight of any rank, finite.
        bias: Its int32 codes will have the scale input_scale * step.
        bits: Of an index, 1 to 4.
        axis: The kept axis; None for one step and one codebook for the whole weight.
        input_scale: Step of the layer's input.
        widest: Bits that hold every value, 8 or 7.

    Raises:
        UsageError: `bits` is not 1 to 4.
    """
    if bias is not None and axis is None:
        bias = np.abs(bias).max(keepdims=True)
    steps = room_for_bias(absmax(weight, Grid(widest), axis), bias, input_scale)
    per_channel = axis is not None and _earns(weight, bits, axis)
    return WeightGrid(tuple(map(float, steps)), axis, bits, values=codebooks(weight, steps, bits, axis, per_channel))


def codebooks(
    weight: npt.NDArray[np.float32],
    steps: npt.NDArray[np.float32],
    bits: int,
    axis: int | None,
    per_channel: bool,
) -> tuple[tuple[int, ...], ...]:
    """The at most 2^bits codes that stand for `weight` with the least squared error, ascending.

    Args:
        weight: Float weight of any rank, finite.
        steps: [channels] or [1]; no weight lies more than 127 steps from 0.
        bits: 1 to 4.
        axis: The kept axis; None for a single step.
        per_channel: One codebook per step; otherwise one for all.

    Raises:
        UsageError: `bits` is not 1 to 4.
    """
    if bits not in BITS:
        raise UsageError(f"a codebook has 1 to 4 bits per weight, not {bits}")
    rows = weight.reshape(1, -1) if axis is None else np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)
    units = rows / steps[:, None]
    if per_channel:
        return tuple(_book(row, np.ones(row.size), 2**bits) for row in units)
    powers = np.square(steps.astype(np.float64) / steps.max())
    return (_book(units.reshape(-1), np.repeat(powers, rows.shape[1]), 2**bits),)


def _earns(weight: npt.NDArray[np.float32], bits: int, axis: int) -> bool:
    """Whether channels are long enough for codebooks of their own, in a layout that these can be looked up in."""
    plain = axis == 0 or weight.ndim == 2
    return plain and 8 * 2**bits * weight.shape[axis] <= SHARE * bits * weight.size


def _book(units: npt.NDArray[np.float32], counts: Floats, size: int) -> tuple[int, ...]:
    """The codes for weights in steps, each of which counts as often as `counts` says."""
    last = Grid().qmax
    bins = np.clip(np.rint(units), -last, last).astype(np.int64) + last
    values = units.astype(np.float64)
    seen = np.unique(bins)
    powers = (np.bincount(bins, counts * values**power, 2 * last + 1)[seen] for power in (0, 1, 2))
    number, first, second = (np.concatenate([[0.0], np.cumsum(power)]) for power in powers)
    return tuple(sorted(set(_centres(number, first, second, size))))


def _centres(number: Floats, first: Floats, second: Floats, count: int) -> list[int]:
    """The at most `count` codes, from cumulative sums over the bins of 1, w and w^2 (a zero in front)."""
    bins, last = len(number) - 1, Grid().qmax
    # error[j, i]: of bins i to j - 1 standing for one integer; infinite where j <= i
    sizes = number[:, None] - number[None, :]
    totals = first[:, None] - first[None, :]
    inside = np.tri(bins + 1, k=-1, dtype=bool)
    centre = np.clip(np.rint(totals / np.where(inside, sizes, 1.0)), -last, last)
    error = (second[:, None] - second[None, :]) - 2 * centre * totals + centre**2 * sizes
    error = np.where(inside, error, np.inf)
    cost = error[:, 0].copy()
    cost[0] = 0.0
    choices = []
    for _ in range(min(count, bins) - 1):
        trial = cost[None, :] + error
        best = trial.argmin(axis=1)
        lower = trial[np.arange(bins + 1), best]
        keep = cost <= lower
        choices.append(np.where(keep, -1, best))
        cost = np.where(keep, cost, lower)
    found, end = [], bins
    for choice in reversed(choices):
        start = int(choice[end])
        if start >= 0:
            found.append(int(centre[end, start]))
            end = start
    return [*found, int(centre[end, 0])]
