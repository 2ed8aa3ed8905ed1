"""What a migration costs: the error of the layers that read an activation, both on their grids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq.grid import Grid, fake_quantize

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
Kernel = npt.NDArray[np.float64]

Steps = Callable[[Matrix, Grid], npt.NDArray[np.floating]]

SHRINKS = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Parts of the observed range that `search` allows the activation grid to cover."""


@dataclass(frozen=True)
class Migration:
    """Ratios and shifts of one tensor, and the grid they aim at.

    Attributes:
        ratios: r, [channels], positive.
        shifts: b, [channels].
        scale: Step of the whole tensor after the migration.
        zero_point: Code of 0.0 after the migration.
    """

    ratios: Vector
    shifts: Vector
    scale: float
    zero_point: int

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return bool((self.ratios == 1.0).all() and not self.shifts.any())


@dataclass(frozen=True)
class Reading:
    """One activation and the layers that read it.

    Attributes:
        samples: X, [rows, channels].
        kernels: W of each layer as `rescale.kernel_of` gives it, [groups, outputs / groups, channels / groups, taps].
            Every tap counts as an output of its own that shares its step with the others.
        low: Smallest value per channel over all data, [channels].
        high: Largest value per channel over all data, [channels].
    """

    samples: Matrix
    kernels: Sequence[Kernel]
    low: Vector
    high: Vector


class Judge:
    """Measures the error of the layers' outputs under a migration, on every so manieth row."""

    def __init__(
        self, reading: Reading, every: int, activation: Grid, weight: Grid, error: str, steps_of: Steps | None
    ) -> None:
        self._steps_of = steps_of
        self._x = reading.samples[::every]
        self._weights = [
            kernel.transpose(0, 2, 3, 1) for kernel in reading.kernels
        ]  # [groups, channels, taps, outputs]
        self._activation, self._weight = activation, weight
        self._low, self._high = reading.low, reading.high
        self._distance: Callable[[Matrix], float] = _squared if error == "mse" else _absolute
        self._expected = [_product(self._x, kernel) for kernel in self._weights]

    def __call__(self, migration: Migration) -> float:
        """Error at the best clipped range, summed over layers."""
        ratios, shifts = migration.ratios, migration.shifts
        moved = (self._x / ratios - shifts).astype(np.float32)
        low = float((self._low / ratios - shifts).min())
        high = float((self._high / ratios - shifts).max())
        wide = [kernel * ratios.reshape(len(kernel), -1, 1, 1) for kernel in self._weights]
        rounded = [self._rounded(kernel) for kernel in wide]
        added = [_product(shifts[None], kernel) for kernel in wide]  # what the layers' biases add back: W' b, in float
        return min(self._error(moved, low * part, high * part, rounded, added) for part in SHRINKS)

    def _rounded(self, kernel: Kernel) -> npt.NDArray[np.float32]:
        groups, channels, taps, outputs = kernel.shape
        matrix = kernel.transpose(1, 2, 0, 3).reshape(channels * taps, groups * outputs)
        if self._steps_of is not None:
            steps = self._steps_of(matrix, self._weight)
        else:
            steps = np.maximum(np.abs(matrix).max(0) / self._weight.qmax, 1e-30)
        codes = fake_quantize(matrix, steps, 0, self._weight, axis=1)
        return codes.reshape(channels, taps, groups, outputs).transpose(2, 0, 1, 3)

    def _error(
        self,
        moved: npt.NDArray[np.float32],
        low: float,
        high: float,
        rounded: Sequence[npt.NDArray[np.float32]],
        added: Sequence[Matrix],
    ) -> float:
        codes = fake_quantize(moved, *self._activation.from_range(low, high), self._activation)
        total = 0.0
        for expected, kernel, bias in zip(self._expected, rounded, added, strict=True):
            size = self._distance(expected) or 1.0
            total += self._distance(_product(codes, kernel) + bias - expected) / size
        return total


def _product(rows: npt.NDArray[np.floating], kernel: npt.NDArray[np.floating]) -> Matrix:
    """[rows, channels] times [groups, channels / groups, taps, outputs / groups] -> [groups, rows, taps x outputs]."""
    groups, channels = kernel.shape[:2]
    parts = rows.reshape(len(rows), groups, channels).transpose(1, 0, 2)
    found: Matrix = parts @ kernel.reshape(groups, channels, -1)
    return found


def _squared(values: Matrix) -> float:
    return float(np.mean(np.square(values)))


def _absolute(values: Matrix) -> float:
    return float(np.mean(np.abs(values)))
