"""Scales of weights: symmetric, one per output channel.

`absmax` is what everybody does: s = max|w| / qmax. `least_squares` searches the clipping that minimises the squared
rounding error of each channel; at 8 bits the two nearly agree, below they do not (METHOD: OMSE, Choukroun et al.,
"Low-bit Quantization of Neural Networks for Efficient Inference", arXiv 1902.06822).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxq.grid import SMALLEST_SCALE, Grid

Floats = npt.NDArray[np.float32]

LOWEST_SHARE = {2: 0.1, 3: 0.2, 4: 0.3, 5: 0.4, 6: 0.6}
"""Bits -> the strongest clipping worth a try: long channels with heavy tails want about that."""


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
    least = _error(rows, best, grid)
    lowest = LOWEST_SHARE.get(grid.bits, 0.8)
    for share in np.linspace(lowest, 1.0, tries, endpoint=False, dtype=np.float32):
        steps = widest * share
        error = _error(rows, steps, grid)
        better = error < least
        best[better], least[better] = steps[better], error[better]
    return best


def room_for_bias(steps: Floats, bias: Floats | None, input_scale: float) -> Floats:
    """`steps`, enlarged where an int32 bias with scale `input_scale * step` would overflow."""
    if bias is None:
        return steps
    needed = np.abs(bias).astype(np.float64) / (input_scale * 2.0**30)
    return np.maximum(steps, needed.astype(np.float32))


def _rows(weight: Floats, axis: int | None) -> Floats:
    if axis is None:
        return weight.reshape(1, -1)
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def _error(rows: Floats, steps: Floats, grid: Grid) -> npt.NDArray[np.float64]:
    column = steps[:, None]
    rounded = np.clip(np.rint(rows / column), grid.qmin, grid.qmax) * column
    error: npt.NDArray[np.float64] = np.square(rows - rounded).sum(axis=1, dtype=np.float64)
    return error


def _positive(steps: npt.NDArray[np.floating], grid: Grid) -> Floats:
    """Dead channels get the median step of the others: their codes are zero whatever it is."""
    steps = steps.astype(np.float32)
    alive = steps > SMALLEST_SCALE
    steps[~alive] = np.median(steps[alive]) if alive.any() else np.float32(1.0 / grid.qmax)
    return steps
