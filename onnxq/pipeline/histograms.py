"""Histograms of weights and activations, and what their grids alone cost."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from onnxq.emit import weight_codes
from onnxq.emit.blocks import block_weight
from onnxq.graph import Layer
from onnxq.grid import Grid, fake_quantize
from onnxq.types import BlockGrid, LearnedLayer, TensorStats
from onnxq.types.details import Bars, TensorDetail, WeightDetail
from onnxq.types.flow import TensorGrid
from onnxq.types.weights import WeightGrid

BINS = 64


def decibels(share: float) -> float:
    """10 log10(signal / noise) from noise over signal."""
    return math.inf if share <= 0 else -10.0 * math.log10(share)


def weight_detail(
    layer: Layer, grid: WeightGrid | None, learned: LearnedLayer | None = None, block: BlockGrid | None = None
) -> WeightDetail:
    """Histograms and error of a layer's weight.

    Args:
        layer: Holds it.
        grid: Its grid; without it and `block`, it stays in float.
        learned: Replaces plain rounding.
        block: What it is stored in in place of `grid`, in blocks of MatMulNBits.
    """
    weight = layer.weight
    bounds = np.abs(np.moveaxis(weight, layer.axis, 0).reshape(layer.channels, -1)).max(axis=1)
    middle, widest = float(np.median(bounds)), int(bounds.argmax())
    spread = float(bounds[widest]) / middle if middle else (math.inf if bounds[widest] else 1.0)
    power = float(np.square(weight, dtype=np.float64).sum())
    if block is not None:
        made = block_weight(layer.weight, block, None if learned is None else learned.codes, signed=True)
        half = 2 ** (block.bits - 1)
        ends = np.stack([made.steps * -half, made.steps * (half - 1)])
        low, high, codes = float(ends.min()), float(ends.max()), _code_bars(made.codes, block.bits)
        restored: npt.NDArray[np.float64] = made.floats().astype(np.float64)
    elif grid is not None:
        steps = np.asarray(grid.scales, np.float32)
        low, high = float((steps * grid.ends()[0]).min()), float((steps * grid.ends()[1]).max())
        rounded = weight_codes(layer, grid) if learned is None else learned.codes
        codes = _code_bars(rounded - grid.along(grid.middles(), rounded.ndim), 8 if grid.values else grid.bits)
        restored = np.asarray(grid.along(steps, rounded.ndim) * rounded, np.float64)
    else:
        return WeightDetail(_bars(weight, float(weight.min()), float(weight.max())), None, None, None, widest, spread)
    noise = np.square(restored - weight, dtype=np.float64).sum()
    return WeightDetail(
        values=_bars(weight, min(float(weight.min()), low), max(float(weight.max()), high)),
        codes=codes,
        clip=(low, high),
        sqnr_db=decibels(float(noise) / power) if power else None,
        widest=widest,
        spread=spread,
    )


def _bars(values: npt.NDArray[np.float32], low: float, high: float) -> Bars:
    """`values` in bins over [low, high]; a single bin where that is a point."""
    if low >= high:
        return Bars((float(values.size),), low, high)
    counts, _ = np.histogram(values, BINS, (low, high))
    return Bars(tuple(counts.astype(float).tolist()), low, high)


def _code_bars(codes: npt.NDArray[np.int8], bits: int) -> Bars:
    """One bin per code, or per four codes and so on where there are more than 64."""
    count = 1 << bits
    width = max(count // BINS, 1)
    counts = np.bincount((codes.reshape(-1).astype(np.int64) + count // 2) // width, minlength=count // width)
    return Bars(tuple(counts.astype(float).tolist()), -count / 2 - 0.5, count / 2 - 0.5)


def tensor_detail(stats: TensorStats, grid: TensorGrid) -> TensorDetail:
    """The histogram of an activation, thinned to 64 bins, and what its grid does to it."""
    codes = Grid(grid.bits, grid.signed, symmetric=False)
    clip = ((codes.qmin - grid.zero_point) * grid.scale, (codes.qmax - grid.zero_point) * grid.scale)
    used = np.flatnonzero(stats.counts) if stats.limit else np.zeros(0, np.int64)
    values, counts = stats.limit * ((2.0 * used + 1.0) / len(stats.counts) - 1.0), stats.counts[used]
    rounded = fake_quantize(values, grid.scale, grid.zero_point, codes)
    power = float(counts @ np.square(values))
    beyond = (values < clip[0] - grid.scale / 2) | (values > clip[1] + grid.scale / 2)
    return TensorDetail(
        values=_thinned(stats, min(stats.low, clip[0]), max(stats.high, clip[1])),
        low=stats.low,
        high=stats.high,
        clip=clip,
        scale=grid.scale,
        zero_point=grid.zero_point,
        bits=grid.bits,
        rule=grid.rule,
        clipped=float(counts[beyond].sum() / counts.sum()) if len(counts) else 0.0,
        sqnr_db=decibels(float(counts @ np.square(values - rounded)) / power) if power else None,
    )


def _thinned(stats: TensorStats, low: float, high: float) -> Bars:
    """The histogram over [low, high], which holds all values; counts of cut bins are shared out."""
    if not stats.limit or low >= high:
        return Bars((float(stats.counts.sum()),), low, high)
    ends = np.linspace(-stats.limit, stats.limit, len(stats.counts) + 1)
    below = np.concatenate([[0.0], np.cumsum(stats.counts)])
    reached = np.interp(np.linspace(low, high, BINS + 1), ends, below)
    reached[0], reached[-1] = 0.0, below[-1]
    counts = np.diff(reached)
    return Bars(tuple(counts.tolist()), low, high)
