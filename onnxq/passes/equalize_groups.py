"""Which layers share the scale of one activation: the members of a group.

A group is all that is joined to a layer's output by operators f with f(s x) = s f(x) for every positive scale s per
channel: Relu, LeakyRelu, PRelu, pooling, Dropout, Flatten behind pooled space, and the sums of residual networks. Its
producers write, and its consumers read, channels that may be scaled and scaled back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from onnxq import graph
from onnxq.graph import Layer, Model, Node, Value

PLAIN = ("Relu", "LeakyRelu", "PRelu", "Clip", "Identity", "Dropout")
"""Element by element; an input that is never negative passes through unchanged (PRelu and Clip: see `_through`)."""
POOLS = ("MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool")
HUGE = 3.0e38
"""Exporters write a missing bound of a Clip as the largest float."""


@dataclass(frozen=True)
class Group:
    """Layers that share one scale per channel.

    Attributes:
        producers: Layers that write the channels.
        consumers: Layers that read them.
        channels: Number of channels.
        links: Nodes between them.
    """

    producers: tuple[Layer, ...]
    consumers: tuple[Layer, ...]
    channels: int
    links: tuple[Node, ...]


def groups(model: Model) -> Iterable[tuple[Layer, Group | str]]:
    """Every group with a layer it was found from, or the reason why that layer's output cannot be scaled."""
    layers = [layer for node in graph.nodes(model) if isinstance(layer := graph.layer_of(node), Layer)]
    made = {layer.output: layer for layer in layers}
    done: set[Value] = set()
    for layer in layers:
        if layer.output in done:
            continue
        walk = _Walk(made)
        reason = walk.start(layer)
        done |= set(walk.axes)
        yield layer, reason or walk.group()


class _Walk:
    """Collects a group from value to value, each with its channel axis counted from the last."""

    def __init__(self, made: dict[Value, Layer]) -> None:
        self._made = made
        self.axes: dict[Value, int] = {}
        self._producers: dict[Node, Layer] = {}
        self._consumers: dict[Node, Layer] = {}
        self._links: dict[Node, None] = {}
        self._todo: list[tuple[Value, int]] = []

    def start(self, layer: Layer) -> str:
        """Walk from `layer`'s output; returns the first reason against the group, or ""."""
        self._todo.append((layer.output, channel_axis(layer)))
        reason = ""
        while self._todo:
            value, axis = self._todo.pop()
            if value in self.axes:
                if self.axes[value] != axis:
                    reason = reason or f"{value.name} is read along two axes"
                continue
            self.axes[value] = axis
            reason = reason or self._made_by(value, axis) or self._read_by(value, axis)
            if reason:
                return reason
        return self._fit()

    def group(self) -> Group:
        """What was collected."""
        producers, consumers = tuple(self._producers.values()), tuple(self._consumers.values())
        return Group(producers, consumers, outputs(producers[0]), tuple(self._links))

    def _fit(self) -> str:
        if not self._consumers:
            return "no layer reads its output"
        if len({*map(outputs, self._producers.values()), *map(inputs, self._consumers.values())}) != 1:
            return "the layers it joins have different numbers of channels"
        return ""

    def _made_by(self, value: Value, axis: int) -> str:
        layer = self._made.get(value)
        if layer is not None:
            self._producers[layer.node] = layer
            return "" if channel_axis(layer) == axis else f"{layer.node.name} writes its channels along another axis"
        node = value.producer()
        if node is None or value.is_graph_input():
            return f"{value.name} is an input of the model or a constant"
        return self._link(node, value, axis)

    def _read_by(self, value: Value, axis: int) -> str:
        if value.is_graph_output():
            return f"{value.name} is an output of the model"
        for node in graph.users(value):
            if node.graph is not value.graph:
                return f"{node.name} inside a subgraph reads it"
            layer = graph.layer_of(node)
            if isinstance(layer, Layer):
                if layer.data is not value or any(other is value for other in node.inputs[1:]):
                    return f"{node.name} reads it as a weight"
                if channel_axis(layer) != axis:
                    return f"{node.name} reads its channels along another axis"
                self._consumers[node] = layer
            elif node.op_type != "Shape":
                reason = self._link(node, value, axis)
                if reason:
                    return reason
        return ""

    def _link(self, node: Node, value: Value, axis: int) -> str:
        """Walk on over `node`, which reads or writes `value`."""
        if node in self._links:
            return ""
        reads = value in node.inputs
        data, output = node.inputs[0], node.outputs[0]
        assert data is not None
        if node.op_type == "Add" and all(graph.constant(other) is None for other in node.inputs):
            shapes = [None if other is None or other.shape is None else len(other.shape) for other in node.inputs]
            if shapes[0] is None or shapes[0] != shapes[1]:
                return f"{node.name} may add along another axis"
            self._todo += [(other, axis) for other in (*node.inputs, output) if other is not None]
        elif node.op_type == "Flatten":
            shape = data.shape
            if shape is None or graph.attribute(node, "axis", 1) != 1 or any(size != 1 for size in list(shape)[2:]):
                return f"{node.name} mixes channels and space"
            if (axis if reads else 1 - len(shape)) != 1 - len(shape) or (not reads and axis != -1):
                return f"{node.name} is along another axis"
            self._todo += [(data, 1 - len(shape)), (output, -1)]
        else:
            reason = _through(node, value, axis)
            if reason:
                return reason
            self._todo += [(data, axis), (output, axis)]
        self._links[node] = None
        return ""


def _through(node: Node, value: Value, axis: int) -> str:
    """Why the scale of `value` does not pass through `node`, or ""."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in PLAIN + POOLS:
        return f"{node.op_type} {node.name} does not keep a scale per channel"
    if value is not node.inputs[0] and value is not node.outputs[0]:
        return f"{node.name} reads or writes it as something else than data"
    if node.op_type == "Clip":
        low, high = (clip_bound(node, index) for index in (1, 2))
        if low not in (0.0, -np.inf) or high != np.inf:
            return f"the bounds of {node.name} would need a scale, too"
    elif node.op_type == "PRelu" and graph.constant(node.inputs[1]) is None:
        return f"the slopes of {node.name} are not constants"
    elif node.op_type in POOLS and (value.shape is None or axis != 1 - len(value.shape)):
        return f"{node.name} pools another axis than space"
    if any(graph.users(output) or output.is_graph_output() for output in node.outputs[1:]):
        return f"the second output of {node.name} is read"
    return ""


def clip_bound(node: Node, index: int) -> float | None:
    """Lower (1) or upper (2) bound of a Clip, infinite where there is none; None where it is not a constant."""
    default = -np.inf if index == 1 else np.inf
    given = node.inputs[index] if len(node.inputs) > index else None
    if given is None:
        return graph.attribute(node, "min" if index == 1 else "max", default)
    array = graph.constant(given)
    if array is None or array.size != 1:
        return None
    bound = float(array.reshape(-1)[0])
    return default if abs(bound) >= HUGE else bound


def channel_axis(layer: Layer) -> int:
    """The axis of the layer's input and of its result that holds channels, counted from the last."""
    return 1 - layer.weight.ndim if layer.node.op_type in ("Conv", "ConvTranspose") else -1


def outputs(layer: Layer) -> int:
    """Number of output channels."""
    groups = graph.attribute(layer.node, "group", 1) if layer.node.op_type == "ConvTranspose" else 1
    return layer.channels * groups


def inputs(layer: Layer) -> int:
    """Number of input channels."""
    groups = graph.attribute(layer.node, "group", 1) if layer.node.op_type == "Conv" else 1
    return int(layer.weight.shape[0 if layer.node.op_type == "ConvTranspose" else 1 - layer.axis]) * groups
