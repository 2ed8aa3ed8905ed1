"""A histogram whose range grows with the data and whose size does not.

It covers [-limit, limit] with a fixed even number of bins. When a value falls outside, the limit doubles and
neighbouring bins merge, so one pass over the data is enough, whatever the range turns out to be.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from onnxq.types import TensorStats

BINS = 8192
"""At 8 bits a step of the grid then spans 16 bins or more, unless the range is clipped far inside the extremes."""
VALUES_PER_BATCH = 1 << 16
"""Larger batches are thinned for the histogram; extremes are always taken from every value."""
TINY = 1e-33
"""A tensor within +-TINY counts as zero: float32 cannot resolve bins of its range."""


class Histogram:
    """Streaming statistics of one tensor.

    Args:
        name: The tensor.
        seed: For thinning large batches.
    """

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name = name
        self._random = np.random.default_rng(seed)
        self._counts = np.zeros(BINS, np.float64)
        self._limit = 0.0
        self._low, self._high = math.inf, -math.inf
        self._lows, self._highs, self._samples = 0.0, 0.0, 0
        self._count = 0
        self._finite = True
        self._shape: tuple[int, ...] | None = None

    def add(self, batch: npt.NDArray[np.float32], *, rows: bool = True) -> None:
        """Take in one batch; its first axis counts samples when `rows` holds."""
        if self._shape is None:
            self._shape = batch.shape
        if batch.size == 0:
            return
        values = batch.reshape(-1)
        table = batch.reshape(len(batch) if rows and batch.ndim else 1, -1)
        lows, highs = table.min(axis=1), table.max(axis=1)
        if not (np.isfinite(lows).all() and np.isfinite(highs).all()):
            self._finite = False
            usable = np.isfinite(table)
            some = usable.any(axis=1)
            lows = table.min(axis=1, initial=np.inf, where=usable)[some]
            highs = table.max(axis=1, initial=-np.inf, where=usable)[some]
            values = table[usable]
            if not values.size:
                return
        self._low = min(self._low, float(lows.min()))
        self._high = max(self._high, float(highs.max()))
        self._lows += float(lows.sum(dtype=np.float64))
        self._highs += float(highs.sum(dtype=np.float64))
        self._samples += len(lows)
        self._grow(max(-self._low, self._high))
        self._fill(values)

    def _grow(self, bound: float) -> None:
        if self._limit == 0.0:
            self._limit = bound * 1.0001 if bound > TINY else 0.0
            return
        while bound > self._limit:
            quarter = BINS // 4
            merged = self._counts.reshape(-1, 2).sum(axis=1)
            self._counts = np.zeros(BINS, np.float64)
            self._counts[quarter : BINS - quarter] = merged
            self._limit *= 2.0

    def _fill(self, values: npt.NDArray[np.float32]) -> None:
        self._count += values.size
        stride = _stride(values.size)
        kept = values[int(self._random.integers(stride)) :: stride] if stride > 1 else values
        share = values.size / len(kept)
        if self._limit == 0.0:
            self._counts[BINS // 2] += values.size
            return
        index = (kept * np.float32(BINS / (2.0 * self._limit)) + np.float32(BINS // 2)).astype(np.int64)
        np.minimum(index, BINS - 1, out=index)
        self._counts += share * np.bincount(index, minlength=BINS)

    def stats(self) -> TensorStats:
        """What was seen so far."""
        seen = self._samples > 0
        return TensorStats(
            name=self.name,
            low=self._low if seen else 0.0,
            high=self._high if seen else 0.0,
            mean_low=self._lows / self._samples if seen else 0.0,
            mean_high=self._highs / self._samples if seen else 0.0,
            counts=self._counts.copy(),
            limit=self._limit,
            count=self._count,
            finite=self._finite,
            shape=self._shape or (),
        )


def _stride(size: int) -> int:
    """How far apart the values are that a batch of `size` values is thinned to.

    It shares no factor with the size, hence with no axis: every channel and position is visited equally often.
    """
    stride = max(size // VALUES_PER_BATCH, 1)
    while math.gcd(stride, size) > 1:
        stride += 1
    return stride
