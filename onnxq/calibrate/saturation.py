"""Would this layer overflow on an x86 processor without VNNI?

There the product of uint8 activations and int8 weights goes through VPMADDUBSW, which adds *pairs* of products in 16
bits and saturates at +-32767 (onnxruntime's documentation on "reduce_range"). With 7-bit weights a pair never exceeds
2 * 255 * 63 = 32130. Whether 8-bit weights really saturate depends on the data, so it is tried: rows of the layer's
own calibration inputs are multiplied pair by pair in the order in which the kernel walks the reduction axis
(kernel position by kernel position, channels innermost), saturated pairs are counted, and what they lack is added up to
the noise of the layer's result. Depthwise convolutions have a kernel of their own, which multiplies in 32 bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Layer, Model
from onnxq.grid import Grid, quantize
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Feeds, TensorGrid, WeightGrid

Codes = npt.NDArray[np.int32]
LIMIT = 32767
POSITIONS = 256
"""Output positions tried per layer and batch."""


@dataclass(frozen=True)
class Saturation:
    """What 16-bit sums would do to a layer.

    Attributes:
        share: Share of its pairs that saturate.
        sqnr_db: Power of its result over that of what saturation takes away, decibels.
    """

    share: float
    sqnr_db: float


def saturating(
    model: Model,
    layers: Mapping[str, Layer],
    tensors: Mapping[str, TensorGrid],
    weights: Mapping[str, WeightGrid],
    rows: Sequence[Feeds],
    *,
    seed: int = 0,
    config: SessionConfig = SessionConfig(stop_spinning=True),
) -> dict[str, Saturation]:
    """What saturation does to every layer that has saturated pairs, by node name.

    Args:
        model: The prepared float model.
        layers: Integer layers by node name.
        tensors: Activation grids by tensor name.
        weights: Weight grids by node name.
        rows: Calibration batches to try.
        seed: Picks the output positions.
        config: How to run.
    """
    pairs = {name: _dangerous(layer, weights[name]) for name, layer in layers.items()}
    risky = {name: layer for name, layer in layers.items() if len(pairs[name].first)}
    if not risky:
        return {}
    fed = {spec[0] for spec in graph.input_specs(model)}
    inner = [name for name in dict.fromkeys(graph.name_of(layer.data) for layer in risky.values()) if name not in fed]
    session = Session(graph.with_outputs(model, inner, keep=False), config) if inner else None
    random = np.random.default_rng(seed)
    hits, tried = dict.fromkeys(risky, 0), dict.fromkeys(risky, 0)
    signal, noise = dict.fromkeys(risky, 0.0), dict.fromkeys(risky, 0.0)
    for feeds in rows:
        values = session.run(feeds, inner) if session is not None else {}
        for name, layer in risky.items():
            data = graph.name_of(layer.data)
            grid = tensors[data]
            floats = values[data] if data in values else feeds[data]
            codes = quantize(floats, grid.scale, grid.zero_point, Grid(grid.bits, grid.signed, symmetric=False))
            columns = _columns(codes, layer, grid.zero_point, random)
            for column in columns:
                count, lost = pairs[name].saturated(column)
                hits[name] += count
                noise[name] += lost
            signal[name] += pairs[name].power(columns - grid.zero_point)
            tried[name] += len(columns) * pairs[name].total
    return {
        name: Saturation(count / tried[name], 10 * float(np.log10(max(signal[name], 1e-30) / noise[name])))
        for name, count in hits.items()
        if count
    }


@dataclass(frozen=True)
class _Pairs:
    """The pairs of weights that saturate with the largest activations: for each, where it reads and its two codes.

    Attributes:
        group: Index of its group of channels.
        at: Position of its first weight along the reduction.
        output: Index of its output within the group.
        first: Code of its first weight.
        second: Code of its second weight.
        matrix: All weight codes, [groups, reduction, outputs].
        steps: Their steps, [groups, outputs].
    """

    group: npt.NDArray[np.int64]
    at: npt.NDArray[np.int64]
    output: npt.NDArray[np.int64]
    first: Codes
    second: Codes
    matrix: Codes
    steps: npt.NDArray[np.float64]

    @property
    def total(self) -> int:
        """Number of all pairs, harmless ones included."""
        groups, reduction, outputs = self.matrix.shape
        return int(groups * (reduction // 2) * outputs)

    def saturated(self, column: Codes) -> tuple[int, float]:
        """How often these pairs saturate on inputs [groups, reduction], and the power of what the outputs lack."""
        sums = column[self.group, self.at] * self.first + column[self.group, self.at + 1] * self.second
        over = np.abs(sums) > LIMIT
        lost = np.zeros(self.steps.shape)
        np.add.at(lost, (self.group[over], self.output[over]), sums[over] - np.clip(sums[over], -LIMIT - 1, LIMIT))
        return int(over.sum()), float(np.square(lost * self.steps).sum())

    def power(self, columns: Codes) -> float:
        """Power of the outputs of inputs [positions, groups, reduction], counted from the zero point."""
        outputs = columns.swapaxes(0, 1).astype(np.float32) @ self.matrix.astype(np.float32)
        return float(np.square(outputs * self.steps[:, None]).sum(dtype=np.float64))


def _dangerous(layer: Layer, weights: WeightGrid) -> _Pairs:
    """Of opposite signs, two products cancel in part; alone, neither reaches the limit."""
    matrix = _matrix(layer, weights)
    even = matrix.shape[1] // 2 * 2
    first, second = matrix[:, 0:even:2], matrix[:, 1:even:2]
    group, pair, output = np.nonzero(255 * np.abs(first + second) > LIMIT)
    scales = np.asarray(weights.scales, np.float64)
    steps = np.broadcast_to(scales, layer.channels).reshape(len(matrix), -1) if matrix.size else np.zeros((1, 0))
    return _Pairs(group, 2 * pair, output, first[group, pair, output], second[group, pair, output], matrix, steps)


def _matrix(layer: Layer, weights: WeightGrid) -> Codes:
    """Weight codes [groups, reduction, outputs], the reduction in the kernel's order; empty where none saturates."""
    codes = weights.codes(layer.weight).astype(np.int32)
    if layer.node.op_type != "Conv":
        return (codes if layer.axis == 1 else codes.T)[None]
    groups = _groups(layer)
    if layer.weight.shape[:2] == (groups, 1):
        return np.zeros((1, 0, 0), np.int32)
    return np.moveaxis(codes, 1, -1).reshape(groups, len(codes) // groups, -1).transpose(0, 2, 1)


def _groups(layer: Layer) -> int:
    return graph.attribute(layer.node, "group", 1)


def _columns(x: Codes, layer: Layer, zero_point: int, random: np.random.Generator) -> Codes:
    """Inputs [positions, groups, reduction] of some output positions; of all where there are few."""
    if layer.node.op_type != "Conv":
        table = x.reshape(-1, 1, x.shape[-1])
        return table[_some(len(table), random)]
    kernel = layer.weight.shape[2:]
    dilations: list[int] = graph.attribute(layer.node, "dilations", [1] * len(kernel))
    strides: list[int] = graph.attribute(layer.node, "strides", [1] * len(kernel))
    spans = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
    padded = np.pad(x, [(0, 0), (0, 0), *_pads(layer, spans)], constant_values=zero_point)
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, x.ndim)))
    steps = (1, 1, *strides, *dilations)
    windows = windows[tuple(slice(None, None, step) for step in steps)]
    counts = (len(x), *windows.shape[2 : x.ndim])
    row, *at = np.unravel_index(_some(int(np.prod(counts)), random), counts)
    chosen: Any = (row, slice(None), *at)
    shape = (len(row), _groups(layer), layer.weight.shape[1], -1)
    columns: Codes = windows[chosen].reshape(shape).swapaxes(2, 3).reshape(*shape[:2], -1)
    return columns


def _pads(layer: Layer, spans: Sequence[int]) -> list[tuple[int, int]]:
    """Padding of each spatial axis, at its begin and end; what SAME gives is only nearly so with strides."""
    if graph.attribute(layer.node, "auto_pad", "NOTSET").startswith("SAME"):
        return [(span // 2, span // 2) for span in spans]
    axes = len(spans)
    pads: list[int] = graph.attribute(layer.node, "pads", [0] * 2 * axes)
    return list(zip(pads[:axes], pads[axes:], strict=True))


def _some(count: int, random: np.random.Generator) -> npt.NDArray[np.int64]:
    return np.arange(count) if count <= POSITIONS else random.integers(count, size=POSITIONS)
