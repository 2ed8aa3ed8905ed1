"""Nodes that compute  y = scale * x + shift  with constants, one pair for the whole tensor or one per channel.

Mul by c and Neg have the scale c and -1, Div by c has 1 / c; Add and Sub of c have the shift c and -c; Sub from c has
the scale -1 and the shift c. BatchNormalization has

    scale = gamma / sqrt(variance + epsilon),    shift = beta - mean * scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Node, Value
from onnxq.types import Array

Floats = npt.NDArray[np.float64]

AFFINE_OPS = ("Mul", "Div", "Add", "Sub", "Neg", "BatchNormalization")


@dataclass(frozen=True)
class Axis:
    """Where a tensor's channels are.

    Attributes:
        behind: Number of axes behind the channel axis: the spatial axes of a convolution, 0 for a matrix product.
        channels: Size of the channel axis.
    """

    behind: int
    channels: int


@dataclass(frozen=True)
class Affine:
    """One such node.

    Attributes:
        node: The node.
        data: The tensor x it reads.
        scale: float64, of one element or one per channel.
        shift: Likewise.
    """

    node: Node
    data: Value
    scale: Floats
    shift: Floats


def operand(node: Node) -> Value | None:
    """The one computed input of a node of `AFFINE_OPS`, or None when it is no such node or has not exactly one."""
    if node.op_type not in AFFINE_OPS or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "BatchNormalization":
        return node.inputs[0]
    computed = [value for value in node.inputs if value is not None and graph.constant(value) is None]
    return computed[0] if len(computed) == 1 else None


def affine_of(node: Node, axis: Axis) -> Affine | str:
    """What `node` computes per channel of its result, whose channels are at `axis`, or why it is not affine.

    A constant that would widen what the node reads is refused, and so is one whose effect cannot be told.
    """
    data = operand(node)
    if data is None:
        return "it has no constant operand"
    if node.op_type == "BatchNormalization":
        return _norm(node, data, axis)
    one, zero = np.ones(1), np.zeros(1)
    if node.op_type == "Neg":
        return Affine(node, data, -one, zero)
    first = node.inputs[0] is data
    stored = graph.constant(node.inputs[1 if first else 0])
    assert stored is not None
    value = _per_channel(stored, data, axis)
    if isinstance(value, str):
        return value
    if node.op_type == "Mul":
        scale, shift = value, zero
    elif node.op_type == "Add":
        scale, shift = one, value
    elif node.op_type == "Sub":
        scale, shift = (one, -value) if first else (-one, value)
    elif first and value.all():
        scale, shift = 1 / value, zero
    else:
        return "it divides by zero" if first else "it divides by what is computed"
    return Affine(node, data, scale, shift)


def norm_affine(node: Node) -> tuple[Floats, Floats] | str:
    """(scale, shift) of an inference-mode BatchNormalization, each [channels], or why it has none."""
    constants = [graph.constant(value) for value in node.inputs[1:5]]
    arrays = [np.asarray(array, np.float64) for array in constants if array is not None]
    if graph.attribute(node, "training_mode", 0) or len(arrays) != 4:
        return f"{node.name} is in training mode or its parameters are not constants"
    gamma, beta, mean, variance = arrays
    spread = variance + graph.attribute(node, "epsilon", 1e-5)
    if not (spread > 0).all():
        return f"the variance of {node.name} is not positive"
    scale = gamma / np.sqrt(spread)
    return scale, beta - mean * scale


def _norm(node: Node, data: Value, axis: Axis) -> Affine | str:
    if len(node.outputs) > 1:
        return f"{node.name} also returns statistics"
    if data.shape is not None and len(data.shape) != axis.behind + 2:
        return "its channels are another axis"
    pair = norm_affine(node)
    if isinstance(pair, str):
        return pair
    if len(pair[0]) != axis.channels:
        return f"it has {len(pair[0])} channels instead of {axis.channels}"
    return Affine(node, data, *pair)


def _per_channel(stored: Array, data: Value, axis: Axis) -> Floats | str:
    """A constant operand as one value or one per channel; it must leave the shape of `data` as it is."""
    if stored.dtype != np.float32 or not np.isfinite(stored).all():
        return "its constant is not float32, or not finite"
    if stored.ndim > 1 and (data.shape is None or len(data.shape) < stored.ndim):
        return "its constant may add axes"
    if stored.size == 1:
        return stored.reshape(1).astype(np.float64)
    place = stored.ndim - 1 - axis.behind
    if place < 0 or stored.shape[place] != stored.size:
        return "its constant varies along other axes than the channels"
    if stored.size != axis.channels:
        return f"its constant has {stored.size} channels instead of {axis.channels}"
    if data.shape is None or len(data.shape) <= axis.behind or data.shape[-1 - axis.behind] != axis.channels:
        return "the number of channels it reads is not known, or smaller than its constant's"
    return stored.reshape(-1).astype(np.float64)
