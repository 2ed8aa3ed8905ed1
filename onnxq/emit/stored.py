"""Stored codes and the DequantizeLinear that restores them: weights, and biases in the form that a target takes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.emit.packing import Packer
from onnxq.errors import UnsupportedError
from onnxq.graph import Layer, Model, Node, Value
from onnxq.types import LearnedLayer, WeightGrid


def steps_of(weights: WeightGrid) -> npt.NDArray[np.float32]:
    """The steps of a weight, a scalar where one serves all."""
    steps = np.asarray(weights.scales, np.float32)
    return steps if weights.axis is not None else steps.reshape(())


def dequantized(
    model: Model,
    name: str,
    codes: np.ndarray,
    steps: np.ndarray,
    axis: int | None,
    before: Node,
    packer: Packer | None = None,
) -> Value:
    """A DequantizeLinear of stored codes, in front of the node that reads it."""
    wanted = f"{name}_q"
    stored = packer.store(wanted, codes, before) if packer else graph.add_constant(model, wanted, codes)
    scale = graph.add_constant(model, f"{name}_scale", steps)
    inputs = [stored, scale]
    if codes.dtype == np.int8:  # Gemm is not fused without an explicit zero point of its weight
        zeros = np.zeros(steps.shape, codes.dtype)
        inputs.append(packer.zeros(steps.shape) if packer else graph.add_constant(model, f"{name}_zero_point", zeros))
    attributes = {} if axis is None else {"axis": axis}
    return graph.add_node(model, "DequantizeLinear", inputs, f"{name}_dq", before=before, attributes=attributes)


def emit_bias(
    model: Model, layer: Layer, weights: WeightGrid, input_scale: float, learned: LearnedLayer | None
) -> None:
    """The bias of a layer, its own or a learned one, in int32 steps of input times weight."""
    node, name = layer.node, str(layer.node.name)
    floats = _floats(layer, learned)
    if floats is None and node.op_type == "Gemm":  # the runtime would fuse a bare one with a Sum or Transpose behind it
        floats = np.zeros(layer.channels, np.float32)
    if floats is None:
        return
    holder, index = _place(layer)
    bias = int32_steps(model, name, floats, np.float32(input_scale) * steps_of(weights), node)
    holder.replace_input_with(index, bias)


def int32_steps(
    model: Model, name: str, floats: npt.NDArray[np.float32], steps: npt.NDArray[np.float32], before: Node
) -> Value:
    """`floats` [channels] as int32 codes of the given steps, one for all or one per channel, restored."""
    steps = steps.astype(np.float32)
    codes = np.clip(np.rint(floats.astype(np.float64) / steps), -(2**31) + 1, 2**31 - 1)
    axis = None if steps.ndim == 0 else 0
    return dequantized(model, f"{name}.bias", codes.astype(np.int32), steps, axis, before)


def float_bias(model: Model, layer: Layer, learned: LearnedLayer | None) -> Value | None:
    """Give a layer its learned bias in float32, where there is one; returns what holds the bias then."""
    if learned is None or learned.bias is None:
        return None
    holder, index = _place(layer)
    return graph.replace_constant(model, holder, index, learned.bias.astype(np.float32), f"{layer.node.name}.bias")


def _floats(layer: Layer, learned: LearnedLayer | None) -> npt.NDArray[np.float32] | None:
    return layer.bias if learned is None or learned.bias is None else learned.bias


def _place(layer: Layer) -> tuple[Node, int]:
    """The node that holds a layer's bias, and which input it is."""
    if layer.bias_add is not None:
        return layer.bias_add, 1 if layer.bias_add.inputs[0] is layer.node.outputs[0] else 0
    if layer.node.op_type == "MatMul":
        raise UnsupportedError(f"a bias was learned for {layer.node.name!r}, which has no Add to hold it.")
    if len(layer.node.inputs) < 3:
        layer.node.resize_inputs(3)
    return layer.node, 2
