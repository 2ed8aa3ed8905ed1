"""Choosing how much of an activation's scale moves into the weights that read it.

All of it works on plain arrays: X [rows, channels] is read by weights W [channels, outputs]; a migration with ratios r
and shifts b replaces them by X / r - b and r * W.

    RepQ-ViT       r = s / s~,   b = s~ (z~ - z)        s, z: the grid of a channel; s~, z~: of the tensor
    SmoothQuant    r = max |X|^a / max |W|^(1 - a)

Since b is a whole number of steps s~, the codes of X / r - b on the grid (s~, z~) are those of X on (s, z).

Z. Li et al., "RepQ-ViT", arXiv 2212.08254; G. Xiao et al., "SmoothQuant", arXiv 2211.10438.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxq.grid import Grid, fake_quantize

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]
Kernel = npt.NDArray[np.float64]

Steps = Callable[[Matrix, Grid], npt.NDArray[np.floating]]

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Values of SmoothQuant's a that `search` tries."""
SHRINKS = (1.0, 0.85, 0.7, 0.55, 0.4)
"""Parts of the observed range that `search` allows the activation grid to cover."""
LEAST_GAIN = 0.01
"""A migration must lower the output error by this share to be worth its rounding."""
HEATS = 4
"""Of the candidates, the best few on every fourth row are compared on all rows."""
FINALISTS = 4
DEAD = 1e-7
"""A channel is constant when its range is below this part of the widest one."""


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


def repq(
    low: npt.ArrayLike, high: npt.ArrayLike, bits: int, signed: bool, *, shift: bool = True, spread: float | None = None
) -> Migration:
    """RepQ-ViT's reparameterisation of per-channel ranges to one grid with the zero point in the middle.

    Channel c has the asymmetric grid s = (high - low) / (2^bits - 1), z = round(qmin - low / s); the tensor has the
    mean s~ of all s and z~ = qmin + 2^(bits - 1). A constant channel keeps r = 1 and is shifted to 0.

    Args:
        low: Smallest value per channel, [channels].
        high: Largest value per channel, [channels].
        bits: Of the activation.
        signed: Whether its codes are signed, so that z~ = 0.
        shift: Whether b may differ from 0; otherwise every channel's grid is symmetric around z~.
        spread: Largest ratio of two channels' steps; narrower channels get wider steps. None does not limit it.

    Raises:
        ValueError: `spread` is below 1.
    """
    if spread is not None and spread < 1.0:
        raise ValueError(f"spread must be 1 or more, not {spread}")
    lows, highs = np.asarray(low, np.float64), np.asarray(high, np.float64)
    levels, zero_point = 2**bits - 1, 0 if signed else 1 << (bits - 1)
    qmin = zero_point - (1 << (bits - 1))
    width = highs - lows if shift else np.maximum(np.abs(lows), np.abs(highs)) * levels / (levels // 2)
    alive = width > DEAD * max(width.max(initial=0.0), np.finfo(np.float64).tiny)
    if not alive.any():
        return Migration(np.ones_like(lows), np.where(shift, lows, 0.0), 1.0, zero_point)
    steps = np.where(alive, width, 1.0) / levels
    if spread is not None:
        steps = np.maximum(steps, steps[alive].max() / spread)
    scale = float(steps[alive].mean())
    steps = np.where(alive, steps, scale)
    shifts = np.zeros_like(lows)
    if shift:
        zeros = np.rint(qmin - lows / steps)
        shifts = np.where(alive, scale * (zero_point - zeros), lows)
    return Migration(steps / scale, shifts, scale, zero_point)


def smooth(activation_max: npt.ArrayLike, weight_max: npt.ArrayLike, strength: float) -> Vector:
    """SmoothQuant's ratios r = activation_max^a / weight_max^(1 - a), with a = `strength`, scaled to a mean log of 0.

    Args:
        activation_max: Largest |x| per channel, [channels].
        weight_max: Largest |w| that reads the channel, [channels].
        strength: a in [0, 1]: 1 moves all of the activation's spread into the weights.

    Returns:
        Ratios, [channels]; 1 for channels that are zero on either side.
    """
    x, w = np.asarray(activation_max, np.float64), np.asarray(weight_max, np.float64)
    alive = (x > 0) & (w > 0)
    if not alive.any():
        return np.ones_like(x)
    logs = strength * np.log(x[alive]) - (1.0 - strength) * np.log(w[alive])
    ratios = np.ones_like(x)
    ratios[alive] = np.exp(logs - logs.mean())
    return ratios


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


def search(
    samples: Matrix,
    weights: Sequence[Matrix],
    activation_bits: int = 8,
    weight_bits: int = 8,
    *,
    shift: bool = True,
    low: Vector | None = None,
    high: Vector | None = None,
    error: Literal["mse", "mae"] = "mse",
    least_gain: float | None = None,
    steps_of: Steps | None = None,
) -> Migration:
    """The migration with the least error of the linear layers' outputs, the identity unless one gains enough.

    Outputs are X W in float against fake-quantised X (one asymmetric grid, at the best of a few clipped ranges) times
    fake-quantised W (one symmetric step per output); each layer's error counts relative to its output's own size.

    Args:
        samples: X, [rows, channels].
        weights: W of each layer, [channels, outputs].
        activation_bits: Of X.
        weight_bits: Of W.
        shift: Whether shifts are allowed.
        low: Smallest value per channel over all data; by default of `samples`.
        high: Largest value per channel over all data; by default of `samples`.
        error: Mean squared or mean absolute error.
        least_gain: Share by which it must lower the error; `LEAST_GAIN` by default.
        steps_of: Steps of a weight [channels, outputs] per output, as the plan will choose them; by default the largest
            magnitude is kept. Steps that clip cost more once activations do not centre on 0.
    """
    x = np.asarray(samples, np.float64)
    lows = np.minimum(x.min(0), np.inf if low is None else low)
    highs = np.maximum(x.max(0), -np.inf if high is None else high)
    kernels = [np.asarray(weight, np.float64).T[None, :, :, None] for weight in weights]
    reading = Reading(x, kernels, lows, highs)
    return search_shared(
        [reading], activation_bits, weight_bits, shift=shift, error=error, least_gain=least_gain, steps_of=steps_of
    )


def search_shared(
    readings: Sequence[Reading],
    activation_bits: int = 8,
    weight_bits: int = 8,
    *,
    shift: bool = True,
    error: Literal["mse", "mae"] = "mse",
    least_gain: float | None = None,
    steps_of: Steps | None = None,
) -> Migration:
    """Like `search`, for layers of any kind, and for several activations that must share their ratios.

    Args:
        readings: The activations; all with the same channels.
        activation_bits: Of all X.
        weight_bits: Of all W.
        shift: Whether shifts are allowed; exact where layers do not pad.
        error: Mean squared or mean absolute error.
        least_gain: Share by which it must lower the error; `LEAST_GAIN` by default.
        steps_of: Steps of a weight [channels x taps, outputs] per output, as the plan will choose them; by default the
            largest magnitude is kept.
    """
    low = reduce(np.minimum, [reading.low for reading in readings])
    high = reduce(np.maximum, [reading.high for reading in readings])
    heaviest = np.max([_heaviest(kernel) for reading in readings for kernel in reading.kernels], 0)
    grid = Grid(activation_bits, signed=False, symmetric=False)

    def judge(every: int) -> Callable[[Migration], float]:
        made = [_Judge(reading, every, grid, Grid(weight_bits), error, steps_of) for reading in readings]
        return lambda migration: sum(each(migration) for each in made)

    heat, final = judge(HEATS), judge(1)
    best = Migration(np.ones(len(low)), np.zeros(len(low)), *grid.from_range(low.min(), high.max()))
    least = (1.0 - (LEAST_GAIN if least_gain is None else least_gain)) * final(best)
    for candidate in sorted(_candidates(low, high, heaviest, grid, shift), key=heat)[:FINALISTS]:
        found = final(candidate)
        if found < least:
            best, least = candidate, found
    return best


def even(samples: Matrix, kernel: Kernel) -> Kernel:
    """`kernel` with every output scaled to a mean square of 1 on `samples`, so that errors of all count alike.

    Where outputs of a layer are loud themselves, because the layer behind takes them back, the others matter no less.
    """
    groups, outputs, _, taps = kernel.shape
    found = _product(samples, kernel.transpose(0, 2, 3, 1)).reshape(groups, -1, taps, outputs)
    size = np.sqrt(np.square(found).mean((1, 2)))
    scaled: Kernel = kernel / np.where(size > 0, size, 1.0)[:, :, None, None]
    return scaled


def _heaviest(kernel: Kernel) -> Vector:
    """Largest |w| that reads each channel, [channels]."""
    largest: Vector = np.abs(kernel).max((1, 3)).reshape(-1)
    return largest


def _candidates(low: Vector, high: Vector, heaviest: Vector, grid: Grid, shift: bool) -> Iterator[Migration]:
    """SmoothQuant at every strength, RepQ-ViT and its square root; where allowed, with every channel centred, too."""
    reach = np.maximum(np.abs(low), np.abs(high))
    centre, half = (low + high) / 2, (high - low) / 2
    for strength in STRENGTHS:
        yield _aimed(smooth(reach, heaviest, strength), np.zeros_like(low), low, high, grid)
        if shift:
            ratios = smooth(half, heaviest, strength)
            yield _aimed(ratios, centre / ratios, low, high, grid)
    if shift:
        yield _aimed(np.ones_like(low), centre, low, high, grid)
    for shifted in (False, True)[: 1 + shift]:
        full = repq(low, high, grid.bits, grid.signed, shift=shifted)
        yield full
        ratios = np.sqrt(full.ratios)
        yield _aimed(ratios, centre / ratios if shifted else np.zeros_like(low), low, high, grid)


def _aimed(ratios: Vector, shifts: Vector, low: Vector, high: Vector, grid: Grid) -> Migration:
    """The migration with the grid that holds all of the moved range."""
    ends = grid.from_range(float((low / ratios - shifts).min()), float((high / ratios - shifts).max()))
    return Migration(ratios, shifts, *ends)


class _Judge:
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
