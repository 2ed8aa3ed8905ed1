"""Constants per channel multiplied into, or added through, the weight and bias of a layer.

    scale * (W x + b) + shift    =  (scale W) x + (scale * b + shift)      output channels
    W (scale * x + shift) + b    =  (W scale) x + (W shift + b)            input channels

Where a weight keeps its channels: Conv [outputs, inputs / group, ...], ConvTranspose [inputs, outputs / group, ...],
MatMul and Gemm [inputs, outputs], or the other way round under transB. Computed in float64, stored as float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Layer, Model, Value
from onnxq.passes.affine import Axis, Floats

Stored = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Edit:
    """New constants of a layer; no bias leaves what is there."""

    layer: Layer
    weight: Stored
    bias: Stored | None


def layer_behind(value: Value | None) -> Layer | str:
    """The layer whose result with bias is `value`, or why there is none."""
    node = graph.producer(value)
    if node is None or node.domain not in ("", "ai.onnx"):
        return "no layer is in front of it"
    head = node
    if node.op_type == "Add":
        head = next((found for found in (graph.producer(x, "MatMul") for x in node.inputs) if found), node)
    if head.op_type not in graph.LAYER_OPS:
        return f"a {head.op_type} is in front of it"
    layer = graph.layer_of(head)
    if isinstance(layer, str):
        return f"{head.name} in front of it cannot take it: {layer}"
    return layer if layer.output is value else f"{node.name} in front of it adds something that is not a bias"


def spatial(layer: Layer) -> int:
    """Number of axes behind the channel axis of what the layer reads and returns."""
    return layer.weight.ndim - 2 if layer.node.op_type in ("Conv", "ConvTranspose") else 0


def output_axis(layer: Layer) -> Axis:
    """The channels of the layer's result."""
    groups = _groups(layer) if layer.node.op_type == "ConvTranspose" else 1
    return Axis(spatial(layer), layer.channels * groups)


def input_axis(layer: Layer) -> Axis:
    """The channels of what the layer reads."""
    groups = _groups(layer) if layer.node.op_type == "Conv" else 1
    return Axis(spatial(layer), int(layer.weight.shape[1 - layer.axis]) * groups)


def scaled_outputs(layer: Layer, scale: Floats) -> Floats:
    """The weight with every output channel multiplied by its scale [output channels]."""
    if layer.node.op_type == "ConvTranspose":
        parts = _parts(layer)
        return (parts * scale.reshape(len(parts), 1, -1, *_ones(layer))).reshape(layer.weight.shape)
    return _along(layer.weight, layer.axis, scale)


def scaled_inputs(layer: Layer, scale: Floats) -> Floats:
    """The weight with every input channel multiplied by its scale [input channels]."""
    if layer.node.op_type == "Conv":
        parts = _parts(layer)
        return (parts * scale.reshape(len(parts), 1, -1, *_ones(layer))).reshape(layer.weight.shape)
    return _along(layer.weight, 1 - layer.axis, scale)


def through(layer: Layer, shift: Floats) -> Floats:
    """[output channels]: what a Conv without padding, a Gemm or a MatMul makes of `shift` [input channels]."""
    product = scaled_inputs(layer, shift)
    added: Floats = product.sum(axis=tuple(axis for axis in range(product.ndim) if axis != layer.axis))
    return added


def edit(layer: Layer, weight: Floats, bias: Floats | None) -> Edit | str:
    """The new constants as float32, or why they cannot be stored."""
    with np.errstate(over="ignore"):
        stored = [None if array is None else array.astype(np.float32) for array in (weight, bias)]
    if not all(array is None or np.isfinite(array).all() for array in stored):
        return "the folded weights are too large for float32"
    assert stored[0] is not None
    return Edit(layer, stored[0], stored[1])


def apply_edit(model: Model, change: Edit) -> None:
    """Give the layer its new constants, never in place: the old may be shared. A MatMul may get an Add for its bias."""
    layer, node = change.layer, change.layer.node
    graph.replace_constant(model, node, 1, change.weight)
    if change.bias is None:
        return
    if node.op_type != "MatMul":
        graph.replace_constant(model, node, 2, change.bias, f"{node.name}_bias")
    elif layer.bias_add is not None:
        add = layer.bias_add
        graph.replace_constant(model, add, 1 if add.inputs[0] is node.outputs[0] else 0, change.bias)
    else:
        product = node.outputs[0]
        bias = graph.add_constant(model, f"{node.name}_bias", change.bias)
        total = graph.add_node(model, "Add", [product, bias], f"{node.name}_add", after=node, dtype=product.dtype)
        total.shape = product.shape
        graph.redirect(product, total, skip=total.producer())
        if product.is_graph_output():
            graph.move_name(product, total, model)


def _groups(layer: Layer) -> int:
    return graph.attribute(layer.node, "group", 1)


def _parts(layer: Layer) -> Floats:
    """A convolution's weight with its groups apart: [groups, axis 0 / groups, axis 1, ...]."""
    weight = layer.weight.astype(np.float64)
    return weight.reshape(_groups(layer), -1, *weight.shape[1:])


def _ones(layer: Layer) -> list[int]:
    return [1] * (layer.weight.ndim - 2)


def _along(weight: npt.NDArray[np.float32], axis: int, scale: Floats) -> Floats:
    return weight.astype(np.float64) * scale.reshape([-1 if a == axis else 1 for a in range(weight.ndim)])
