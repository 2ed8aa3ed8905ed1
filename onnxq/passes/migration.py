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
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxq.grid import Grid, fake_quantize

Vector = npt.NDArray[np.float64]
Matrix = npt.NDArray[np.float64]

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
    channels = x.shape[1]
    grid = Grid(activation_bits, signed=False, symmetric=False)
    heat, judge = (
        _Judge(rows, weights, grid, Grid(weight_bits), lows, highs, error, steps_of) for rows in (x[::HEATS], x)
    )
    best = identity = Migration(np.ones(channels), np.zeros(channels), *grid.from_range(lows.min(), highs.max()))
    least = (1.0 - (LEAST_GAIN if least_gain is None else least_gain)) * judge(identity)
    for candidate in sorted(_candidates(lows, highs, weights, grid, shift), key=heat)[:FINALISTS]:
        found = judge(candidate)
        if found < least:
            best, least = candidate, found
    return best


def _candidates(low: Vector, high: Vector, weights: Sequence[Matrix], grid: Grid, shift: bool) -> Iterator[Migration]:
    """SmoothQuant at every strength, RepQ-ViT and its square root; where allowed, with every channel centred, too."""
    reach = np.maximum(np.abs(low), np.abs(high))
    heaviest = np.max([np.abs(weight).max(1) for weight in weights], 0)
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
    """Measures the error of the layers' outputs under a migration."""

    def __init__(
        self,
        samples: Matrix,
        weights: Sequence[Matrix],
        activation: Grid,
        weight: Grid,
        low: Vector,
        high: Vector,
        error: str,
        steps_of: Steps | None,
    ) -> None:
        self._steps_of = steps_of
        self._x, self._weights = samples, weights
        self._activation, self._weight = activation, weight
        self._low, self._high = low, high
        self._distance: Callable[[Matrix], float] = _squared if error == "mse" else _absolute
        self._expected = [samples @ matrix for matrix in weights]

    def __call__(self, migration: Migration) -> float:
        """Error at the best clipped range, summed over layers."""
        ratios, shifts = migration.ratios, migration.shifts
        moved = (self._x / ratios - shifts).astype(np.float32)
        low = float((self._low / ratios - shifts).min())
        high = float((self._high / ratios - shifts).max())
        rounded = [self._rounded(matrix * ratios[:, None]) for matrix in self._weights]
        # what the layers' biases add back: W' b, in float
        added = [shifts @ (matrix * ratios[:, None]) for matrix in self._weights]
        return min(self._error(moved, low * part, high * part, rounded, added) for part in SHRINKS)

    def _rounded(self, matrix: Matrix) -> npt.NDArray[np.float32]:
        if self._steps_of is not None:
            steps = self._steps_of(matrix, self._weight)
        else:
            steps = np.maximum(np.abs(matrix).max(0) / self._weight.qmax, 1e-30)
        return fake_quantize(matrix, steps, 0, self._weight, axis=1)

    def _error(
        self,
        moved: npt.NDArray[np.float32],
        low: float,
        high: float,
        rounded: Sequence[npt.NDArray[np.float32]],
        added: Sequence[Vector],
    ) -> float:
        codes = fake_quantize(moved, *self._activation.from_range(low, high), self._activation)
        total = 0.0
        for expected, matrix, bias in zip(self._expected, rounded, added, strict=True):
            size = self._distance(expected) or 1.0
            total += self._distance(codes @ matrix + bias - expected) / size
        return total


def _squared(values: Matrix) -> float:
    return float(np.mean(np.square(values)))


def _absolute(values: Matrix) -> float:
    return float(np.mean(np.abs(values)))
