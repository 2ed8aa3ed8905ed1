"""Would this layer overflow on an x86 processor without VNNI?

There the product of uint8 activations and int8 weights goes through VPMADDUBSW, which adds *pairs* of products in 16
bits and saturates at +-32767 (onnxruntime's documentation on "reduce_range"). With 7-bit weights a pair never exceeds
2 * 255 * 63 = 32130. Whether 8-bit weights really saturate depends on the data, so it is tried: rows of the layer's
own calibration inputs are multiplied pair by pair in the order in which the kernel walks the reduction axis
(kernel position by kernel position, channels innermost), and saturated pairs are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
POSITIONS = 64
"""Output positions tried per layer and batch."""


def saturating(
    model: Model,
    layers: Mapping[str, Layer],
    tensors: Mapping[str, TensorGrid],
    weights: Mapping[str, WeightGrid],
    rows: Sequence[Feeds],
    *,
    seed: int = 0,
    config: SessionConfig = SessionConfig(stop_spinning=True),
) -> dict[str, float]:
    """Share of saturated pairs of every layer that has any, by node name.

    Args:
        model: The prepared float model.
        layers: Integer layers by node name.
        tensors: Activation grids by tensor name.
        weights: Weight grids by node name.
        rows: Calibration batches to try.
        seed: Picks the output positions.
        config: How to run.
    """
    risky = {name: layer for name, layer in layers.items() if _possible(layer, weights[name])}
    names = list(dict.fromkeys(graph.name_of(layer.data) for layer in risky.values()))
    fed = {spec[0] for spec in graph.input_specs(model)}
    inner = [name for name in names if name not in fed]
    session = Session(graph.with_outputs(model, inner, keep=False), config) if inner else None
    random = np.random.default_rng(seed)
    hits: dict[str, list[float]] = {name: [] for name in risky}
    for feeds in rows:
        values = session.run(feeds, inner) if session is not None else {}
        for name, layer in risky.items():
            data = graph.name_of(layer.data)
            grid = tensors[data]
            x = quantize(
                values[data] if data in values else feeds[data], grid.scale, grid.zero_point, Grid(8, False, False)
            )
            hits[name].append(_share(_columns(x, layer, random), _matrix(layer, weights[name])))
    shares = {name: float(np.mean(found)) for name, found in hits.items() if found}
    return {name: share for name, share in shares.items() if share > 0.0}


def _possible(layer: Layer, weights: WeightGrid) -> bool:
    """Whether any pair of codes could saturate with the largest activation."""
    matrix = _matrix(layer, weights)
    if len(matrix) < 2:
        return False
    a, b = _pairs(matrix)
    same_sign = np.where(np.sign(a) * np.sign(b) >= 0, np.abs(a) + np.abs(b), np.maximum(np.abs(a), np.abs(b)))
    return bool(255 * int(same_sign.max(initial=0)) > LIMIT)


def _matrix(layer: Layer, weights: WeightGrid) -> Codes:
    """Weight codes [reduction, outputs] of the first group, the reduction in the kernel's order."""
    steps = np.asarray(weights.scales, np.float32)
    if weights.axis is None:
        steps = steps.reshape(())
    codes = quantize(layer.weight, steps, np.int32(0), Grid(weights.bits), weights.axis)
    if layer.node.op_type != "Conv":
        return codes if layer.axis == 1 else codes.T
    group = graph.attribute(layer.node, "group", 1)
    first = codes[: len(codes) // group]
    return np.moveaxis(first, 1, -1).reshape(len(first), -1).T


def _columns(x: Codes, layer: Layer, random: np.random.Generator) -> Codes:
    """Some rows [positions, reduction] of the layer's input codes, of the first group."""
    if layer.node.op_type != "Conv":
        table = x.reshape(-1, x.shape[-1])
        return table[random.integers(len(table), size=min(POSITIONS, len(table)))]
    kernel = layer.weight.shape[2:]
    dilations: list[int] = graph.attribute(layer.node, "dilations", [1] * len(kernel))
    part = x[:, : layer.weight.shape[1]]
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    room = [size - span for size, span in zip(part.shape[2:], spans, strict=True)]
    if min(room) < 0:
        return np.zeros((0, layer.weight[0].size), np.int32)
    picked = []
    for _ in range(POSITIONS):
        at = [int(random.integers(free + 1)) for free in room]
        window: Any = tuple(slice(a, a + s, d) for a, s, d in zip(at, spans, dilations, strict=True))
        row = part[(int(random.integers(len(part))), slice(None), *window)]
        picked.append(np.moveaxis(row, 0, -1).reshape(-1))
    return np.stack(picked)


def _pairs(matrix: Codes) -> tuple[Codes, Codes]:
    even = len(matrix) // 2 * 2
    return matrix[0:even:2], matrix[1:even:2]


def _share(columns: Codes, matrix: Codes) -> float:
    if not len(columns) or len(matrix) < 2:
        return 0.0
    a, b = _pairs(matrix)
    u, v = _pairs(columns.T)
    sums = u.T[:, :, None] * a[None] + v.T[:, :, None] * b[None]
    return float((np.abs(sums) > LIMIT).mean())
