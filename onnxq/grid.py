"""The integer grid: which integers a tensor may take, and how floats map to them.

    q = clip(round_half_even(x / scale) + zero_point, qmin, qmax)        x_hat = (q - zero_point) * scale

as in ONNX QuantizeLinear / DequantizeLinear. `axis` is always the axis that is *kept*: a per-channel grid has one
scale per index of that axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

SMALLEST_SCALE = float(np.float32(1e-36))
"""Values that are smaller than this count as zero: far above the denormal numbers, which kernels may flush."""
EMPTY_SCALE = float(np.float32(1e-8))
"""A grid of an all-zero tensor still needs a positive scale."""


@dataclass(frozen=True)
class Grid:
    """The integers of a tensor.

    Attributes:
        bits: 2 to 8, or 16; levels are `2 ** bits` (one fewer when symmetric: the lowest signed code is not used).
        signed: Signed codes (weights) or unsigned codes (activations).
        symmetric: The zero point is 0 and the range is [-a, a].
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 and self.bits != 16:
            raise ValueError(f"a grid has 2 to 8 or 16 bits, not {self.bits}")
        if self.symmetric and not self.signed:
            raise ValueError("a symmetric grid is signed")

    @property
    def dtype(self) -> npt.DTypeLike:
        """What the codes are stored in."""
        wide = self.bits > 8
        return (np.int16 if wide else np.int8) if self.signed else (np.uint16 if wide else np.uint8)

    @property
    def qmin(self) -> int:
        """Lowest code."""
        if not self.signed:
            return 0
        return -(1 << (self.bits - 1)) + (1 if self.symmetric else 0)

    @property
    def qmax(self) -> int:
        """Highest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    def from_range(self, low: float, high: float) -> tuple[float, int]:
        """Scale and zero point of the smallest grid that holds [low, high] and represents 0 exactly.

        Args:
            low: Lower end of the clipped float interval.
            high: Upper end.

        Returns:
            (scale, zero_point) with scale > 0 in float32 precision.
        """
        low, high = min(low, 0.0), max(high, 0.0)
        if high - low < SMALLEST_SCALE:
            return EMPTY_SCALE, 0 if self.symmetric else self.qmin
        if self.symmetric:
            bound = max(-low, high)
            return max(float(np.float32(bound / self.qmax)), SMALLEST_SCALE), 0
        scale = max(float(np.float32((high - low) / (self.qmax - self.qmin))), SMALLEST_SCALE)
        for _ in range(8):
            zero_point = int(np.clip(round(self.qmin - low / scale), self.qmin, self.qmax))
            if scale <= SMALLEST_SCALE or self._ends(low, high, scale, zero_point):
                break
            scale = float(np.nextafter(np.float32(scale), np.float32(0)))
        return scale, zero_point

    def _ends(self, low: float, high: float, scale: float, zero_point: int) -> bool:
        """Whether `low` and `high` get the outermost codes: the runtime absorbs only Clips that the grid cuts off."""
        first, last = np.rint(np.asarray([low, high], np.float32) / np.float32(scale)) + zero_point
        return bool(first <= self.qmin and last >= self.qmax)


def quantize(
    x: npt.ArrayLike, scale: npt.ArrayLike, zero_point: npt.ArrayLike, grid: Grid, axis: int | None = None
) -> npt.NDArray[np.int32]:
    """Codes of `x`, as int32.

    Args:
        x: Floats of any shape.
        scale: A scalar, or one value per index of `axis`.
        zero_point: Like `scale`.
        grid: Gives the lowest and highest code.
        axis: The kept axis of a per-channel grid; None for a per-tensor grid.
    """
    values = np.asarray(x, np.float32)
    steps, zeros = _along(scale, values.ndim, axis), _along(zero_point, values.ndim, axis)
    codes = np.rint(values / steps.astype(np.float32)) + zeros
    clipped: npt.NDArray[np.int32] = np.clip(codes, grid.qmin, grid.qmax).astype(np.int32)
    return clipped


def dequantize(
    codes: npt.ArrayLike, scale: npt.ArrayLike, zero_point: npt.ArrayLike, axis: int | None = None
) -> FloatArray:
    """Floats of integer `codes`; the arguments are those of `quantize`."""
    values = np.asarray(codes).astype(np.int32)
    steps, zeros = _along(scale, values.ndim, axis), _along(zero_point, values.ndim, axis)
    result: FloatArray = (values - zeros).astype(np.float32) * steps.astype(np.float32)
    return result


def fake_quantize(
    x: npt.ArrayLike, scale: npt.ArrayLike, zero_point: npt.ArrayLike, grid: Grid, axis: int | None = None
) -> FloatArray:
    """`x` rounded to the grid, as float32: what QuantizeLinear followed by DequantizeLinear gives."""
    return dequantize(quantize(x, scale, zero_point, grid, axis), scale, zero_point, axis)


def _along(values: npt.ArrayLike, ndim: int, axis: int | None) -> npt.NDArray[Any]:
    array = np.asarray(values)
    if axis is None or array.ndim == 0:
        return array
    shape = [1] * ndim
    shape[axis] = -1
    return array.reshape(shape)
