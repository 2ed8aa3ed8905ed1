"""What an operator becomes when the axes of the tensors it works on are put in another order.

With t' = Transpose(t, perm), axis a of t is axis perm.index(a) of t', and for each operator f here there is an f' of
the same type with  f'(x', ...) = f(x, ...)':  element-wise operators are their own f' (constants transposed along),
the others have their axes renamed or their per-axis lists reordered. A reduction without keepdims gives what it gave
before, when the axes it keeps stay in order; its result has no layout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from onnxq import graph
from onnxq.graph import Model, Node, Value

Perm = tuple[int, ...]

_UNARY = (
    "Abs", "Cast", "Ceil", "Celu", "Clip", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish",
    "Identity", "LeakyRelu", "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign",
    "Softplus", "Softsign", "Sqrt", "Tanh", "ThresholdedRelu",
)  # fmt: skip
_BROADCAST = (
    "Add", "And", "Div", "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mul",
    "Or", "PRelu", "Pow", "Sub", "Sum", "Where",
)  # fmt: skip
_AXIS = {"Concat": 0, "LogSoftmax": -1, "Softmax": -1, "Split": 0}
_REDUCE = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceProd", "ReduceSumSquare")


@dataclass(frozen=True)
class Relaid:
    """A node that can work in another layout.

    Attributes:
        data: Indices of the inputs that have to come in that layout.
        outputs: Whether its outputs are in that layout then; a reduction to fewer axes has the same output.
        rewrite: Changes the node's attributes and constants (not its data inputs) to that layout.
    """

    data: tuple[int, ...]
    rewrite: Callable[[Model], None] = field(repr=False)
    outputs: bool = True


def relaid(model: Model, node: Node, perm: Perm) -> Relaid | None:
    """How `node` works on tensors transposed by `perm`, or None when it cannot (or its rank is not that of `perm`)."""
    if node.domain not in ("", "ai.onnx") or not node.inputs:
        return None
    if node.op_type in _BROADCAST:
        return _broadcast(node, perm)
    if rank_of(node.inputs[0]) != len(perm) or graph.constant(node.inputs[0]) is not None:
        return None
    if node.op_type in _UNARY:
        return Relaid((0,), _nothing)
    if node.op_type in _AXIS:
        return _one_axis(node, perm)
    if node.op_type in _REDUCE:
        return _reduction(model, node, perm)
    if node.op_type == "Pad":
        return _pad(node, perm)
    if node.op_type == "Slice":
        return _slice(node, perm)
    return _resize(node, perm) if node.op_type == "Resize" else None


def rank_of(value: Value | None) -> int | None:
    """Number of axes, None when unknown."""
    if value is None or value.shape is None:
        return None
    return len(value.shape)


def _nothing(model: Model) -> None:
    """Element-wise operators without constants stay as they are."""


def _broadcast(node: Node, perm: Perm) -> Relaid | None:
    data: list[int] = []
    constants: dict[int, np.ndarray] = {}
    for index, value in enumerate(node.inputs):
        array, rank = graph.constant(value), rank_of(value)
        if array is not None:
            if array.ndim > len(perm):
                return None
            if array.size > 1:
                constants[index] = array.reshape((1,) * (len(perm) - array.ndim) + array.shape).transpose(perm)
        elif rank == len(perm):
            data.append(index)
        elif rank != 0:
            return None

    def rewrite(model: Model) -> None:
        for index, array in constants.items():
            graph.replace_constant(model, node, index, array)

    return Relaid(tuple(data), rewrite) if data else None


def _one_axis(node: Node, perm: Perm) -> Relaid | None:
    axis = graph.attribute(node, "axis", _AXIS[node.op_type]) % len(perm)
    data = range(len(node.inputs)) if node.op_type == "Concat" else range(1)
    if any(rank_of(node.inputs[index]) != len(perm) for index in data):
        return None
    return Relaid(tuple(data), lambda model: graph.set_attribute(node, "axis", perm.index(axis)))


def _reduction(model: Model, node: Node, perm: Perm) -> Relaid | None:
    as_input = graph.opset(model) >= (13 if node.op_type == "ReduceSum" else 18)
    given = _integers(node, 1) if as_input else graph.attribute(node, "axes", list[int]())
    if not given:
        return None
    axes = [axis % len(perm) for axis in given]
    kept = [axis for axis in perm if axis not in axes]
    keepdims = graph.attribute(node, "keepdims", 1) == 1
    if not keepdims and kept != sorted(kept):
        return None
    moved = sorted(perm.index(axis) for axis in axes)

    def rewrite(model: Model) -> None:
        if as_input:
            graph.replace_constant(model, node, 1, np.array(moved, np.int64))
        else:
            graph.set_attribute(node, "axes", moved)

    return Relaid((0,), rewrite, outputs=keepdims)


def _pad(node: Node, perm: Perm) -> Relaid | None:
    pads, rank = _integers(node, 1), len(perm)
    if pads is None or len(pads) != 2 * rank or _given(node, 3):
        return None
    moved = np.array([pads[side * rank + axis] for side in (0, 1) for axis in perm], np.int64)

    def rewrite(model: Model) -> None:
        graph.replace_constant(model, node, 1, moved)

    return Relaid((0,), rewrite)


def _slice(node: Node, perm: Perm) -> Relaid | None:
    given = graph.constant(node.inputs[1])
    axes = _integers(node, 3) if _given(node, 3) else list(range(0 if given is None else given.size))
    if given is None or axes is None:
        return None
    moved = np.array([perm.index(axis % len(perm)) for axis in axes], given.dtype)

    def rewrite(model: Model) -> None:
        graph.replace_constant(model, node, 3, moved)

    return Relaid((0,), rewrite)


def _resize(node: Node, perm: Perm) -> Relaid | None:
    """The sizes or scales of the axes are reordered. Only modes for which the runtime has kernels in both layouts."""
    mode = graph.attribute(node, "mode", "nearest")
    if mode != "nearest" and (mode, len(perm)) != ("linear", 4):
        return None
    if graph.attribute(node, "antialias", 0) or node.attributes.get("axes") is not None:
        return None
    if graph.attribute(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize":
        return None
    index = 3 if _given(node, 3) else 2
    array = graph.constant(node.inputs[index]) if _given(node, index) else None
    if array is None or len(array) != len(perm):
        return None
    moved = array[list(perm)]

    def rewrite(model: Model) -> None:
        graph.replace_constant(model, node, index, moved)

    return Relaid((0,), rewrite)


def _given(node: Node, index: int) -> bool:
    """Whether the optional input `index` is there; an empty constant stands for an absent one."""
    if index >= len(node.inputs) or node.inputs[index] is None:
        return False
    array = graph.constant(node.inputs[index])
    return array is None or array.size > 0


def _integers(node: Node, index: int) -> list[int] | None:
    array = graph.constant(node.inputs[index]) if index < len(node.inputs) else None
    return None if array is None else [int(entry) for entry in array.reshape(-1)]
