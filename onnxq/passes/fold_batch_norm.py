"""BatchNormalization becomes part of the Conv, ConvTranspose, Gemm or MatMul (+ Add) that feeds it.

In inference it is  y = s * x + t  per channel, with

    s = gamma / sqrt(variance + epsilon),    t = beta - s * mean,

so a layer W, b in front of it becomes  W' = s * W,  b' = s * b + t,  each output channel of W with its own s.
Output channels are axis 0 of a Conv's weight; axis 1 of a ConvTranspose's, where group g of its input
channels holds the outputs g * C, ..., (g + 1) * C - 1; the columns of a Gemm's or MatMul's. Computed in
float64, stored as float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.passes.base import Pass

Vector = npt.NDArray[np.float64]
Stored = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Fold:
    """A layer and the constants that make it do the work of the BatchNormalization behind it."""

    layer: graph.Layer
    weight: Stored
    bias: Stored


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold inference-mode BatchNormalization into the layer that feeds it."""

    def __call__(self, model: graph.Model) -> int:
        """Rewrite `model` in place; returns the number of BatchNormalization nodes removed."""
        folded = 0
        for norm in graph.nodes(model, "BatchNormalization"):
            plan = _plan(norm)
            if isinstance(plan, _Fold):
                _write(plan, norm, model)
                folded += 1
        return folded

    def refused(self, model: graph.Model) -> dict[str, str]:
        """BatchNormalization nodes that stay: node name -> reason."""
        plans = ((norm, _plan(norm)) for norm in graph.nodes(model, "BatchNormalization"))
        return {str(norm.name): plan for norm, plan in plans if isinstance(plan, str)}


def _plan(norm: graph.Node) -> _Fold | str:
    """What to write, or why `norm` stays."""
    if graph.attribute(norm, "training_mode", 0) or any(output.name for output in norm.outputs[1:]):
        return "it is in training mode; export the model in evaluation mode"
    layer = _layer_before(norm)
    if isinstance(layer, str):
        return layer
    affine = _affine(norm)
    if isinstance(affine, str):
        return affine
    scale, shift = affine
    groups = graph.attribute(layer.node, "group", 1) if layer.node.op_type == "ConvTranspose" else 1
    if len(scale) != layer.channels * groups:
        return f"it has {len(scale)} channels, {layer.node.name} in front of it {layer.channels * groups}"
    bias = np.zeros(len(scale)) if layer.bias is None else layer.bias.astype(np.float64)
    with np.errstate(over="ignore"):
        weight = _scaled(layer, scale, groups).astype(np.float32)
        bias32 = (scale * bias + shift).astype(np.float32)
    if not (np.isfinite(weight).all() and np.isfinite(bias32).all()):
        return "the folded weights are too large for float32"
    return _Fold(layer, weight, bias32)


def _layer_before(norm: graph.Node) -> graph.Layer | str:
    """The layer whose result `norm` alone reads, or why there is none."""
    value = norm.inputs[0]
    node = graph.producer(value)
    if value is None or node is None:
        return "no Conv, ConvTranspose, Gemm or MatMul is in front of it"
    head = node
    if node.op_type == "Add":
        head = next((found for found in (graph.producer(x, "MatMul") for x in node.inputs) if found), node)
    if head.op_type not in graph.LAYER_OPS or head.domain not in ("", "ai.onnx"):
        return f"a {head.op_type} is in front of it, not a Conv, ConvTranspose, Gemm or MatMul"
    layer = graph.layer_of(head)
    if isinstance(layer, str):
        return f"{head.name} in front of it cannot take it: {layer}"
    if layer.output is not value:
        return f"{node.name} in front of it adds something that is not a bias"
    if graph.only_user(value) is not norm:
        return f"the output of {node.name} has another reader or is an output of the model"
    if head.op_type == "MatMul" and (value.shape is None or len(value.shape) != 2):
        return f"the output of {node.name} is not known to be a matrix, so its channels may be another axis"
    return layer


def _affine(norm: graph.Node) -> tuple[Vector, Vector] | str:
    """(s, t) of y = s * x + t, or why they are not known."""
    constants = [graph.constant(value) for value in norm.inputs[1:5]]
    found = [array.astype(np.float64) for array in constants if array is not None]
    if len(found) != 4:
        return "its parameters are not constants"
    gamma, beta, mean, variance = found
    spread = variance + graph.attribute(norm, "epsilon", 1e-5)
    if not (spread > 0).all():
        return "its variance is not positive"
    scale = gamma / np.sqrt(spread)
    return scale, beta - scale * mean


def _scaled(layer: graph.Layer, scale: Vector, groups: int) -> Vector:
    """The weight with every output channel multiplied by its scale."""
    weight = layer.weight.astype(np.float64)
    if groups > 1:
        parts = weight.reshape(groups, -1, *weight.shape[1:])  # [groups, inputs / groups, outputs / groups, ...]
        return (parts * scale.reshape(groups, 1, -1, *[1] * (weight.ndim - 2))).reshape(weight.shape)
    return weight * scale.reshape([-1 if axis == layer.axis else 1 for axis in range(weight.ndim)])


def _write(fold: _Fold, norm: graph.Node, model: graph.Model) -> None:
    """Give the layer its new constants (never in place: the old may be shared) and remove `norm`."""
    layer, node = fold.layer, fold.layer.node
    graph.replace_constant(model, node, 1, fold.weight)
    if node.op_type != "MatMul":
        graph.replace_constant(model, node, 2, fold.bias, f"{node.name}_bias")
    elif layer.bias_add is not None:
        add = layer.bias_add
        graph.replace_constant(model, add, 1 if add.inputs[0] is node.outputs[0] else 0, fold.bias)
    else:
        product = node.outputs[0]
        bias = graph.add_constant(model, f"{node.name}_bias", fold.bias)
        total = graph.add_node(model, "Add", [product, bias], f"{node.name}_add", after=node, dtype=product.dtype)
        total.shape = product.shape
        norm.replace_input_with(0, total)
    graph.bypass(norm, model)
