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

from onnxq import graph
from onnxq.passes.affine import norm_affine
from onnxq.passes.base import Pass
from onnxq.passes.scaling import Edit, apply_edit, edit, output_axis, scaled_outputs


@dataclass(frozen=True)
class FoldBatchNorm(Pass):
    """Fold inference-mode BatchNormalization into the layer that feeds it."""

    def __call__(self, model: graph.Model) -> int:
        """Rewrite `model` in place; returns the number of BatchNormalization nodes removed."""
        folded = 0
        for norm in graph.nodes(model, "BatchNormalization"):
            change = _change(norm)
            if isinstance(change, Edit):
                apply_edit(model, change)
                graph.bypass(norm, model)
                folded += 1
        return folded

    def refused(self, model: graph.Model) -> dict[str, str]:
        """BatchNormalization nodes that stay: node name -> reason."""
        changes = ((norm, _change(norm)) for norm in graph.nodes(model, "BatchNormalization"))
        return {str(norm.name): reason for norm, reason in changes if isinstance(reason, str)}


def _change(norm: graph.Node) -> Edit | str:
    """What becomes of the layer in front of `norm`, or why `norm` stays."""
    if graph.attribute(norm, "training_mode", 0) or any(output.name for output in norm.outputs[1:]):
        return "it is in training mode; export the model in evaluation mode"
    layer = _layer_before(norm)
    if isinstance(layer, str):
        return layer
    affine = norm_affine(norm)
    if isinstance(affine, str):
        return affine
    scale, shift = affine
    channels = output_axis(layer).channels
    if len(scale) != channels:
        return f"it has {len(scale)} channels, {layer.node.name} in front of it {channels}"
    bias = 0.0 if layer.bias is None else layer.bias.astype(np.float64)
    return edit(layer, scaled_outputs(layer, scale), scale * bias + shift)


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
