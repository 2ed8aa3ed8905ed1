"""Cross-layer equalisation: channels that one layer writes small and the next reads large meet in the middle.

For a layer W1, b1 whose output reaches W2 through operators f with f(s x) = s f(x), and any positive s per channel,

    W1' = W1 / s (rows),    b1' = b1 / s,    W2' = W2 * s (columns)

computes the same. With r1, r2 the largest |weight| of each channel's row and column,

    s = sqrt(r1 * r2) / r2        makes both       sqrt(r1 * r2)

so that one step per tensor wastes less of a weight's grid. Where several layers write or read the channels (residual
sums, branches) r1 and r2 are geometric means over them. Groups overlap in layers that read one and write another, so
they are visited in turn until no s moves.

High-bias absorption: where the smallest value c that a channel takes before its Relu is positive, b1' = b1 - c and
b2' = b2 + W2 c let the activation start at 0.

M. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721, sections
4.1 and 4.2 (there c comes from BatchNormalization; here from calibration).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Layer, Model, Node
from onnxq.passes.base import Pass
from onnxq.passes.equalize_groups import Group, groups, outputs
from onnxq.passes.rescale import (
    Vector,
    bias_of,
    kernel_of,
    response,
    scale_inputs,
    scale_outputs,
    takes_shift,
    weight_of,
    write_layer,
)

TOLERANCE = 1e-3
"""Relative change of s below which a group is settled."""
SWEEPS = 200
DEAD = 1e-4
"""A channel whose range is below this part of its layer's is dead: scaling it up would only blow up its bias."""
RISING = ("Relu", "LeakyRelu", "PRelu", "Identity", "Dropout", "Clip", "GlobalAveragePool", "Flatten")
"""Operators g with g(x - c) = g(x) - c wherever x >= c >= 0."""


@dataclass(frozen=True)
class Equalize(Pass):
    """Equalise the weights of neighbouring layers.

    Attributes:
        floors: Smallest value per channel of a layer's output (before any activation), [channels], by the tensor's
            name: what is positive is absorbed by the next layer. Exact only on data that stays above it. None absorbs
            nothing. A tensor that was absorbed gets another name, as it holds other values.
    """

    floors: Mapping[str, npt.NDArray[np.float32]] | None = None

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of groups scaled plus the number absorbed."""
        absorbed = 0
        while self.floors and any(_absorb(model, group, self.floors) for group in _found(model)):
            absorbed += 1  # the layers behind have new biases now: look again
        found = _found(model)
        scales = [scale if np.abs(scale - 1.0).max() >= TOLERANCE else np.ones_like(scale) for scale in balance(found)]
        write_scales(model, found, scales)
        return absorbed + sum(bool((scale != 1.0).any()) for scale in scales)

    def refused(self, model: Model) -> Mapping[str, str]:
        """Layers whose output cannot be scaled: node name -> reason."""
        return {str(layer.node.name): group for layer, group in groups(model) if isinstance(group, str)}


def _found(model: Model) -> list[Group]:
    return [group for _, group in groups(model) if isinstance(group, Group)]


def balance(found: Sequence[Group]) -> list[Vector]:
    """The scale s of every group, [channels] each, after as many sweeps as it takes for all of them to settle."""
    members = {layer.node: layer for group in found for layer in (*group.producers, *group.consumers)}
    sizes = {node: np.abs(kernel_of(layer)).max(3, keepdims=True) for node, layer in members.items()}
    totals = [np.ones(group.channels) for group in found]
    for _ in range(SWEEPS):
        moved = 0.0
        for index, group in enumerate(found):
            step = _step(group, sizes)
            for layer in group.producers:
                sizes[layer.node] = scale_outputs(sizes[layer.node], 1.0 / step)
            for layer in group.consumers:
                sizes[layer.node] = scale_inputs(sizes[layer.node], step)
            totals[index] *= step
            moved = max(moved, float(np.abs(step - 1.0).max()))
        if moved < TOLERANCE / 10:
            break
    return totals


def _step(group: Group, sizes: Mapping[Node, Vector]) -> Vector:
    """S = sqrt(r1 r2) / r2, and 1 for channels that are dead on either side."""
    rows, written = _log_mean([sizes[layer.node].max((2, 3)).reshape(-1) for layer in group.producers])
    columns, read = _log_mean([sizes[layer.node].max((1, 3)).reshape(-1) for layer in group.consumers])
    step: Vector = np.where(written & read, np.exp((rows - columns) / 2.0), 1.0)
    return step


def _log_mean(ranges: Sequence[Vector]) -> tuple[Vector, npt.NDArray[np.bool_]]:
    """Mean over layers of log(range), and the channels that are alive in some layer.

    Where a channel is dead in one of several layers, it counts there as that layer's average.
    """
    alive = [values > DEAD * values.max() for values in ranges]
    logs = []
    for values, live in zip(ranges, alive, strict=True):
        log = np.log(values, where=live, out=np.zeros(len(values)))
        logs.append(np.where(live, log, log[live].mean() if live.any() else 0.0))
    return np.mean(logs, axis=0), np.any(alive, axis=0)


def write_scales(model: Model, found: Sequence[Group], scales: Sequence[Vector]) -> None:
    """Divide what each group's producers write by its s, [channels], and multiply what its consumers read by it.

    Layers of groups whose s is 1 only are left alone.
    """
    written: dict[Node, Layer] = {}
    reads: dict[Node, Vector] = {}
    writes: dict[Node, Vector] = {}
    for group, scale in zip(found, scales, strict=True):
        if (scale == 1.0).all():
            continue
        writes.update((layer.node, scale) for layer in group.producers)
        reads.update((layer.node, scale) for layer in group.consumers)
        written.update((layer.node, layer) for layer in (*group.producers, *group.consumers))
    for node, layer in written.items():
        kernel, bias = kernel_of(layer), None
        if node in reads:
            kernel = scale_inputs(kernel, reads[node])
        if node in writes:
            kernel = scale_outputs(kernel, 1.0 / writes[node])
            bias = None if layer.bias is None else bias_of(layer, outputs(layer)) / writes[node]
        write_layer(model, layer, weight_of(layer, kernel), bias)


def _absorbs(group: Group) -> bool:
    """Whether a constant may move from the one producer of `group` to its consumers."""
    linked = all(node.op_type in RISING for node in group.links)
    return len(group.producers) == 1 and linked and all(takes_shift(layer) for layer in group.consumers)


def _absorb(model: Model, group: Group, floors: Mapping[str, npt.NDArray[np.float32]]) -> bool:
    """Move what the producer's output never falls below into the biases behind it."""
    if not _absorbs(group):
        return False
    (layer,) = group.producers
    floor = floors.get(graph.name_of(layer.output))
    if floor is None or not (np.asarray(floor) > 0).any():
        return False
    if np.shape(floor) != (group.channels,):
        raise ValueError(f"{layer.output.name} has {group.channels} channels, not {np.shape(floor)}")
    rest = np.maximum(np.asarray(floor, np.float64), 0.0)
    for reader in group.consumers:
        kernel = kernel_of(reader)
        bias = bias_of(reader, outputs(reader)) + response(kernel, rest)
        write_layer(model, reader, reader.weight, bias)
    write_layer(model, layer, layer.weight, bias_of(layer, outputs(layer)) - rest)
    layer.output.name = graph.unique_name(model, f"{layer.output.name}_lowered")
    return True
