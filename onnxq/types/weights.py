"""The grid of a weight: the int8 codes that it may take, and what a step between them is worth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class WeightGrid:
    """The grid of one weighted node's weights: w = code * scale, code in int8.

    Without `lowest` it is symmetric. With it the codes of a channel are the 2^bits integers from its lowest one on: a
    grid with a zero point of its own for every channel, which kernels refuse, but with the zero point taken off the
    codes already. Codes of 7 bits or less have room for that in int8. With `values` the codes are no consecutive
    integers, but those of a codebook.

    Attributes:
        scales: One step per output channel, or a single one.
        axis: The kept axis of the weight, None for a single step.
        bits: Number of bits; fewer than 8 are stored in int8 codes. Of a codebook, those of an index into it, 1 to 4.
        lowest: As many integers as scales, or none.
        values: Codebooks: the at most 2^bits codes, ascending, of the whole weight or of each scale's channel.
    """

    scales: tuple[float, ...]
    axis: int | None
    bits: int = 8
    lowest: tuple[int, ...] = ()
    values: tuple[tuple[int, ...], ...] = ()

    def middles(self) -> npt.NDArray[np.int32]:
        """What a channel's codes are centred at: 2^(bits - 1) above the lowest one; as many as scales."""
        if not self.lowest:
            return np.zeros(len(self.scales), np.int32)
        return np.asarray(self.lowest, np.int32) + (1 << (self.bits - 1))

    def ends(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """The lowest and the highest codes, as many as scales."""
        if self.values:
            shape = len(self.scales)
            low, high = (np.asarray([book[end] for book in self.values], np.int32) for end in (0, -1))
            return np.broadcast_to(low, shape), np.broadcast_to(high, shape)
        half = 1 << (self.bits - 1)
        return self.middles() - (half if self.lowest else half - 1), self.middles() + half - 1

    def along(self, values: npt.NDArray[Any], rank: int) -> npt.NDArray[Any]:
        """`values`, one per scale, to be broadcast against a weight of `rank` dimensions."""
        return values.reshape([-1 if axis == self.axis else 1 for axis in range(rank)])

    def codes(self, weight: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
        """`weight` rounded to the nearest codes, half to even (of codebooks, half down); int8 of its shape."""
        steps = np.asarray(self.scales, np.float32)
        if self.values:
            return self._chosen(weight / self.along(steps, weight.ndim))
        steps, low, high = (self.along(values, weight.ndim) for values in (steps, *self.ends()))
        codes: npt.NDArray[np.int8] = np.clip(np.rint(weight / steps), low, high).astype(np.int8)
        return codes

    def _chosen(self, units: npt.NDArray[np.float32]) -> npt.NDArray[np.int8]:
        """The nearest codes of the codebooks, for a weight in steps."""
        if len(self.values) == 1:
            return nearest(units, self.values[0])
        assert self.axis is not None
        rows = zip(np.moveaxis(units, self.axis, 0), self.values, strict=True)
        return np.ascontiguousarray(np.moveaxis(np.stack([nearest(row, book) for row, book in rows]), 0, self.axis))


def nearest(units: npt.NDArray[np.floating], book: tuple[int, ...]) -> npt.NDArray[np.int8]:
    """The codes of an ascending codebook that are nearest to `units`; of two as near, the lower one."""
    values = np.asarray(book, np.int8)
    middles = (values[1:].astype(np.float64) + values[:-1]) / 2
    found: npt.NDArray[np.int8] = values[np.searchsorted(middles, units)]
    return found
