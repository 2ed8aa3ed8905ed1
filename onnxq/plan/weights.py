"""Scales of weights: one per output channel.

`absmax` is what everybody does: s = max|w| / qmax. `least_squares` searches the clipping that minimises the squared
rounding error of each channel; at 8 bits the two nearly agree, below they do not (METHOD: OMSE, Choukroun et al.,
"Low-bit Quantization of Neural Networks for Efficient Inference", arXiv 1902.06822). `offset_least_squares` also
searches where each channel's codes begin: few codes are too dear to be spent on a side where there are no weights.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxq.grid import SMALLEST_SCALE, Grid
from onnxq.types import WeightGrid

Floats = npt.NDArray[np.float32]

SMALLEST_PRODUCT, LARGEST_STEP = 2.0**-120, 2.0**120
"""What multiplies an integer sum stays well within the normal float32 numbers."""
DEAD_SHARE = 1e-10
"""A channel whose step is below this share of the largest one is dead."""
LOWEST_SHARE = {2: 0.1, 3: 0.2, 4: 0.3, 5: 0.4, 6: 0.6}
"""Bits -> the strongest clipping worth a try: long channels with heavy tails want about that."""
CLIPPINGS = 25
"""That are tried, each with four places where codes can begin."""
ROUGH = 10
"""Clippings that are tried where only the sizes of steps matter."""


def weight_grid(weight: Floats, bias: Floats | None, bits: int, axis: int | None, input_scale: float) -> WeightGrid:
    """The grid of a weight: symmetric at 7 and 8 bits; with fewer, its codes begin where the weights do.

    Args:
        weight: Float weight of any rank.
        bias: Its int32 codes will have the scale input_scale * step.
        bits: 2 to 8.
        axis: The kept axis; None for one step for the whole tensor.
        input_scale: Step of the layer's input.
    """
    if bias is not None and axis is None:
        bias = np.abs(bias).max(keepdims=True)
    lowest: tuple[int, ...] = ()
    if bits >= 7:
        steps = absmax(weight, Grid(bits), axis)
    else:
        steps, starts = offset_least_squares(weight, bits, axis)
        lowest = tuple(map(int, starts))
    return WeightGrid(tuple(map(float, room_for_bias(steps, bias, input_scale))), axis, bits, lowest)


def absmax(weight: Floats, grid: Grid, axis: int | None) -> Floats:
    """Steps that keep every weight inside the grid.

    Args:
        weight: Float weight of any rank.
        grid: A symmetric grid.
        axis: The kept axis; None for one step for the whole tensor.

    Returns:
        Positive steps, shape [channels] or [1].
    """
    rows = _rows(weight, axis)
    bound = np.abs(rows).max(axis=1)
    return _positive(bound / grid.qmax, grid)


def least_squares(weight: Floats, grid: Grid, axis: int | None, *, tries: int = 40) -> Floats:
    """Steps with the smallest squared error among `tries` clippings of `absmax`'s; arguments as there."""
    rows = _rows(weight, axis)
    widest = absmax(weight, grid, axis)
    best = widest.copy()
    least = _error(rows, best, grid.qmin, grid.qmax)
    lowest = LOWEST_SHARE.get(grid.bits, 0.8)
    for share in np.linspace(lowest, 1.0, tries, endpoint=False, dtype=np.float32):
        steps = widest * share
        error = _error(rows, steps, grid.qmin, grid.qmax)
        better = error < least
        best[better], least[better] = steps[better], error[better]
    return best


def rough_steps(matrix: npt.NDArray[np.floating], grid: Grid) -> Floats:
    """Steps per output of a weight [inputs, outputs], like those of few bits, but symmetric and from fewer tries."""
    return least_squares(matrix.astype(np.float32), grid, 1, tries=ROUGH)


def offset_least_squares(weight: Floats, bits: int, axis: int | None) -> tuple[Floats, npt.NDArray[np.int32]]:
    """Steps, and lowest codes of 2^bits consecutive ones, with the smallest squared error among `CLIPPINGS`.

    Args:
        weight: Float weight of any rank.
        bits: 2 to 7.
        axis: The kept axis; None for one step for the whole tensor.

    Returns:
        Positive steps and the lowest codes, -(2^bits - 1) to 0, each of shape [channels] or [1].
    """
    rows, last = _rows(weight, axis), (1 << bits) - 1
    low, high, mean = rows.min(axis=1), rows.max(axis=1), rows.mean(axis=1)
    widest = _positive((np.maximum(high, 0) - np.minimum(low, 0)) / last, Grid(bits))
    best, first = widest.copy(), np.zeros(len(rows), np.int32)
    least = np.full(len(rows), np.inf)
    for share in np.linspace(LOWEST_SHARE.get(bits, 0.8), 1.0, CLIPPINGS, dtype=np.float32):
        steps = widest * share
        middle = np.rint((low + high) / (2 * steps) - last / 2)
        bulk = np.rint(mean / steps - last / 2)
        for start in (middle, bulk - 1, bulk, bulk + 1):
            lowest = np.clip(start, -last, 0)
            error = _error(rows, steps, lowest[:, None], lowest[:, None] + last)
            better = error < least
            best[better], first[better], least[better] = steps[better], lowest[better], error[better]
    return best, first


def room_for_bias(steps: Floats, bias: Floats | None, input_scale: float) -> Floats:
    """`steps`, enlarged where a product `input_scale * step` would be denormal or an int32 bias of it overflow."""
    needed = np.full(steps.shape, SMALLEST_PRODUCT / input_scale)
    if bias is not None:
        needed = np.maximum(needed, np.abs(bias).astype(np.float64) / (input_scale * 2.0**30))
    roomy: Floats = np.maximum(steps, np.minimum(needed, LARGEST_STEP).astype(np.float32))
    return roomy


def _rows(weight: Floats, axis: int | None) -> Floats:
    if axis is None:
        return weight.reshape(1, -1)
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def _error(rows: Floats, steps: Floats, lowest: npt.ArrayLike, highest: npt.ArrayLike) -> npt.NDArray[np.float64]:
    column = steps[:, None]
    rounded = np.clip(np.rint(rows / column), lowest, highest).astype(np.float32) * column
    error: npt.NDArray[np.float64] = np.square(rows - rounded).sum(axis=1, dtype=np.float64)
    return error


def _positive(steps: npt.NDArray[np.floating], grid: Grid) -> Floats:
    """Dead channels get the median step of the others: their codes are zero whatever it is."""
    steps = steps.astype(np.float32)
    alive = steps > max(SMALLEST_SCALE, DEAD_SHARE * float(steps.max(initial=0.0)))
    steps[~alive] = np.median(steps[alive]) if alive.any() else np.float32(1.0 / grid.qmax)
    return steps
