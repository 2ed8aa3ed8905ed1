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
from functools import reduce
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxq.grid import Grid
from onnxq.passes.readings import Judge, Kernel, Matrix, Migration, Reading, Steps, Vector

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Values of SmoothQuant's a that `search` tries."""
LEAST_GAIN = 0.01
"""A migration must lower the output error by this share to be worth its rounding."""
HEATS = 4
"""Of the candidates, the best few on every fourth row are compared on all rows."""
FINALISTS = 4
DEAD = 1e-7
"""A channel is constant when its range is below this part of the widest one."""


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
        Ratios, [channels]; 1 for channels that are next to zero on either side.
    """
    x, w = np.asarray(activation_max, np.float64), np.asarray(weight_max, np.float64)
    alive = (x > DEAD * x.max(initial=0.0)) & (w > DEAD * w.max(initial=0.0))
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
        made = [Judge(reading, every, grid, Grid(weight_bits), error, steps_of) for reading in readings]
        return lambda migration: sum(each(migration) for each in made)

    heat, final = judge(HEATS), judge(1)
    best = Migration(np.ones(len(low)), np.zeros(len(low)), *grid.from_range(low.min(), high.max()))
    least = (1.0 - (LEAST_GAIN if least_gain is None else least_gain)) * final(best)
    for candidate in sorted(_candidates(low, high, heaviest, grid, shift), key=heat)[:FINALISTS]:
        found = final(candidate)
        if found < least:
            best, least = candidate, found
    return best


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
