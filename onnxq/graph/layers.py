"""Layers: the weighted nodes, seen the same way whatever the exporter wrote.

A layer is a Conv, ConvTranspose, Gemm or MatMul with a constant weight, together with the Add that holds its bias (a
MatMul has no bias of its own) and the Relu or Clip that the runtime's integer kernel absorbs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.graph.look import attribute, constant, only_user, producer

PRODUCT = "both operands are computed at run time"
LAYER_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Layer:
    """One weighted node.

    Attributes:
        node: The Conv, ConvTranspose, Gemm or MatMul.
        weight: Its weight, float32, as stored.
        axis: The kept (output channel) axis of the weight. For a grouped ConvTranspose the axis holds the output
            channels of one group only.
        bias: Float32 bias of shape [output channels], or None.
        bias_add: The Add behind a MatMul that holds the bias, or None.
        output: The layer's result with bias, before any activation.
    """

    node: ir.Node
    weight: npt.NDArray[np.float32]
    axis: int
    bias: npt.NDArray[np.float32] | None
    bias_add: ir.Node | None
    output: ir.Value

    @property
    def channels(self) -> int:
        """Size of the kept axis."""
        return int(self.weight.shape[self.axis])

    @property
    def data(self) -> ir.Value:
        """The activation the layer reads."""
        value = self.node.inputs[0]
        assert value is not None
        return value


def layer_of(node: ir.Node) -> Layer | str:
    """The layer that `node` is the head of, or the reason why it is none."""
    if node.op_type not in LAYER_OPS or node.domain not in ("", "ai.onnx"):
        return f"{node.op_type} has no weights"
    if len(node.inputs) < 2 or node.inputs[0] is None:
        return "an input is missing"
    if constant(node.inputs[0]) is not None:
        return "its first operand is the constant one" if node.op_type == "MatMul" else "its input is a constant"
    weight = constant(node.inputs[1])
    if weight is None:
        return PRODUCT if node.op_type == "MatMul" else "its weight is not a constant"
    if weight.dtype != np.float32:
        return f"its weight is {weight.dtype}"
    if not np.isfinite(weight).all():
        return "its weight holds infinities or NaN"
    if weight.size == 0:
        return "its weight is empty"
    if node.op_type == "MatMul":
        return _matmul(node, weight)
    if node.op_type == "Gemm":
        return _gemm(node, weight)
    bias = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if bias is None and len(node.inputs) > 2 and node.inputs[2] is not None:
        return "its bias is not a constant"
    return Layer(node, weight, 0 if node.op_type == "Conv" else 1, bias, None, node.outputs[0])


def _gemm(node: ir.Node, weight: npt.NDArray[Any]) -> Layer | str:
    if attribute(node, "transA", 0):
        return "its first operand is transposed"
    if attribute(node, "alpha", 1.0) != 1.0 or attribute(node, "beta", 1.0) != 1.0:
        return "alpha or beta is not 1"
    axis = 0 if attribute(node, "transB", 0) else 1
    bias: npt.NDArray[Any] | None = None
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        stored = constant(node.inputs[2])
        if stored is None:
            return "its bias is not a constant"
        bias = as_bias(stored, weight.shape[axis])
        if bias is None:
            return f"its bias has shape {list(stored.shape)}"
    return Layer(node, weight, axis, bias, None, node.outputs[0])


def _matmul(node: ir.Node, weight: npt.NDArray[Any]) -> Layer | str:
    if weight.ndim != 2:
        return f"its weight has {weight.ndim} axes"
    add = only_user(node.outputs[0])
    if add is not None and add.op_type == "Add" and add.domain in ("", "ai.onnx"):
        other = add.inputs[1] if add.inputs[0] is node.outputs[0] else add.inputs[0]
        bias = _added_bias(constant(other), weight.shape[1], _rank(node.inputs[0]))
        if bias is not None:
            return Layer(node, weight, 1, bias, add, add.outputs[0])
    return Layer(node, weight, 1, None, None, node.outputs[0])


def _added_bias(stored: npt.NDArray[Any] | None, channels: int, rank: int) -> npt.NDArray[Any] | None:
    """What is added to a MatMul's result of `rank` axes, as a bias; a lone number or one of more axes is none."""
    if stored is None or stored.dtype != np.float32 or stored.ndim > rank or stored.size == 1 < channels:
        return None
    return as_bias(stored, channels)


def _rank(value: ir.Value | None) -> int:
    """Number of axes; 2 where it is unknown."""
    return 2 if value is None or value.shape is None else len(value.shape)


def as_bias(stored: npt.NDArray[Any], channels: int) -> npt.NDArray[Any] | None:
    """`stored` as a vector of `channels` values, or None when it is not a bias over the last axis."""
    if stored.ndim > 3 or any(size != 1 for size in stored.shape[:-1]):
        return None
    last = stored.shape[-1] if stored.ndim else 1
    if last not in (1, channels):
        return None
    return np.broadcast_to(stored.reshape(-1), (channels,))


def silu_gate(node: ir.Node) -> ir.Node | None:
    """The Sigmoid of a Mul that computes x * Sigmoid(x), if nothing else reads it; None for any other node."""
    if node.op_type != "Mul" or node.domain not in ("", "ai.onnx"):
        return None
    for value in node.inputs:
        gate = producer(value, "Sigmoid")
        if gate is not None and gate.inputs[0] in node.inputs and only_user(gate.outputs[0]) is node:
            return gate
    return None


@dataclass(frozen=True)
class Activation:
    """A Relu or Clip that an integer kernel absorbs into its output grid.

    Attributes:
        node: The Relu or Clip.
        low: Smallest value it lets through.
        high: Largest value it lets through; infinite for Relu.
    """

    node: ir.Node
    low: float
    high: float


def activation_after(value: ir.Value) -> Activation | None:
    """The Relu, or the Clip whose interval holds 0, that is the only reader of `value`."""
    node = only_user(value)
    if node is None or node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Relu":
        return Activation(node, 0.0, np.inf)
    if node.op_type != "Clip":
        return None
    bounds = []
    for index, default in ((1, -np.inf), (2, np.inf)):
        given = node.inputs[index] if len(node.inputs) > index else None
        array = constant(given)
        if given is not None and array is None:
            return None
        bounds.append(default if array is None else float(array.reshape(-1)[0]))
    low, high = bounds
    return Activation(node, low, high) if low <= 0.0 <= high and low < high else None
