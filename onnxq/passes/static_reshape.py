"""Target shapes of Reshape that are computed from the data's own shape become constants.

    Reshape(x, Concat(Shape(y)[0], Shape(y)[1], h, d))    ->    Reshape(x, [0, 0, h, d])

Exporters write the former for tensors with free axes; a 0 copies the axis of x at that place. y is x, or a tensor that
x is computed from by nodes that keep the axis. In every run that saves a Shape, and a Gather, an Unsqueeze and a Concat
for every axis: a fifth of the nodes of a small transformer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxq import graph
from onnxq.graph import Model, Node, Value
from onnxq.passes.base import Pass

_UNARY = {
    "Abs", "Cast", "Clip", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LayerNormalization",
    "LeakyRelu", "Log", "LogSoftmax", "Neg", "RMSNormalization", "Relu", "Sigmoid", "Softmax", "Softplus", "Sqrt",
    "Tanh",
}  # fmt: skip
"""Operators whose result has the shape of their first input."""
_BROADCAST = {"Add", "Sub", "Mul", "Div", "Sum"}


@dataclass(frozen=True)
class _Axis:
    """The size of an axis of a tensor, as an element of a shape."""

    value: Value
    axis: int


@dataclass(frozen=True)
class StaticReshape(Pass):
    """Write target shapes of Reshape as constants where they are computed from the shape of the data."""

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of shapes written."""
        written = 0
        for node in graph.nodes(model, "Reshape"):
            shape = _static(node)
            if shape is not None:
                name = f"{node.name}_shape"
                node.replace_input_with(1, graph.add_constant(model, name, np.asarray(shape, np.int64)))
                written += 1
        return written

    def refused(self, model: Model) -> Mapping[str, str]:
        """Shapes that are computed from something else are nothing that it would handle."""
        return {}


def _static(node: Node) -> list[int] | None:
    """The target shape with copied axes; None where it is constant already, or not only made of the data's axes."""
    data, target = node.inputs[0], node.inputs[1]
    if (
        data is None
        or data.shape is None
        or graph.attribute(node, "allowzero", 0)
        or graph.constant(target) is not None
    ):
        return None
    parts = _elements(target)
    if parts is None:
        return None
    shape: list[int] = []
    for place, part in enumerate(parts):
        if isinstance(part, int):
            shape.append(part)
        elif part.axis == place < len(data.shape) and _keeps(data, part.value, place):
            shape.append(0)
        else:
            return None
    return shape


def _elements(value: Value | None) -> list[int | _Axis] | None:
    """The elements of a computed one-dimensional shape, as far as they are numbers and sizes of axes."""
    known = graph.constant(value)
    if known is not None:
        return [int(number) for number in known.reshape(-1)]
    node = graph.producer(value, "Concat", "Unsqueeze", "Squeeze", "Gather", "Slice", "Shape")
    if node is None:
        return None
    if node.op_type == "Concat":
        parts = [_elements(part) for part in node.inputs]
        return None if any(part is None for part in parts) else [element for part in parts if part for element in part]
    if node.op_type == "Shape":
        return _axes(node)
    inner = _elements(node.inputs[0])
    if inner is None or node.op_type in ("Unsqueeze", "Squeeze"):
        return inner if inner is None or len(inner) == 1 else None
    return _gathered(node, inner) if node.op_type == "Gather" else _sliced(node, inner)


def _axes(node: Node) -> list[int | _Axis] | None:
    """What a Shape returns."""
    source = node.inputs[0]
    if source is None or source.shape is None or {"start", "end"} & set(node.attributes):
        return None
    return [_Axis(source, axis) for axis in range(len(source.shape))]


def _gathered(node: Node, inner: Sequence[int | _Axis]) -> list[int | _Axis] | None:
    indices = graph.constant(node.inputs[1])
    if (
        indices is None
        or indices.ndim > 1
        or not all(-len(inner) <= index < len(inner) for index in indices.reshape(-1))
    ):
        return None
    return [inner[int(index)] for index in indices.reshape(-1)]


def _sliced(node: Node, inner: Sequence[int | _Axis]) -> list[int | _Axis] | None:
    given = [graph.constant(value) for value in node.inputs[1:]]
    if len(given) < 2 or any(array is None or array.size != 1 for array in given):
        return None
    start, end, _, step = (*(int(array.reshape(-1)[0]) for array in given if array is not None), 0, 1)[:4]
    return list(inner[slice(start, end, step if len(given) > 3 else 1)])


def _keeps(data: Value, source: Value, axis: int) -> bool:
    """Whether both have the same size there, because they are computed from one tensor by nodes that keep the axis."""
    seen = set(_ancestors(data, axis))
    return any(value in seen for value in _ancestors(source, axis))


def _ancestors(value: Value, axis: int) -> Iterator[Value]:
    """The value and those that it is computed from, as long as they have the same size there."""
    found: Value | None = value
    while found is not None:
        yield found
        found = _before(found, axis)


def _before(value: Value, axis: int) -> Value | None:
    """The operand of the node that makes `value` whose axis at that place is that of `value`."""
    node = graph.producer(value)
    if node is None or value.shape is None or node.domain not in ("", "ai.onnx") or value is not node.outputs[0]:
        return None
    rank = len(value.shape)
    if node.op_type in _UNARY:
        return node.inputs[0]
    if node.op_type == "MatMul":
        matrix, data = graph.constant(node.inputs[1]), node.inputs[0]
        plain = matrix is not None and matrix.ndim == 2 and data is not None and data.shape is not None
        return data if plain and axis < rank - 1 else None
    if node.op_type not in _BROADCAST:
        return None
    computed = [operand for operand in node.inputs if graph.constant(operand) is None]
    constants = [array for array in map(graph.constant, node.inputs) if array is not None]
    narrow = all(array.ndim < rank - axis or array.shape[axis - rank] == 1 for array in constants)
    only = computed[0] if len(computed) == 1 else None
    return only if narrow and only is not None and only.shape is not None and len(only.shape) == rank else None
