"""A constant factor of attention scores becomes part of the projection of the queries (or of the keys).

    softmax(s q k^T)      =  softmax((s q) k^T),        s q  =  (s W) x + s b

The factor may stand behind the product, or on the way from a projection to it, on one side or on both. Between the
factor and a layer (Gemm, MatMul, Conv, with its bias) only nodes may stand that move elements; where one projection
makes queries, keys and values, only the output channels that the factor reaches are scaled. Behind a product of two
computed tensors the factor goes into the first one, or else the second one. Nothing on the way may be read by
anybody else, but for nodes that pick other elements of the same tensor or ask for its shape.

The rule knows nothing else of attention: any scalar factor that only such nodes separate from a layer is folded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxq import graph
from onnxq.graph import Layer, Model, Node, Value
from onnxq.passes import scaling
from onnxq.passes.affine import Axis, Floats, affine_of, operand
from onnxq.passes.base import Pass
from onnxq.passes.elements import MOVES, PICKS, RESHAPES, Elements, behind, meet


@dataclass(frozen=True)
class _Reach:
    """A layer, and which of its output channels a factor reaches."""

    layer: Layer
    channels: Elements


@dataclass(frozen=True)
class FoldAttentionScale(Pass):
    """Fold scalar factors into the projections they come from."""

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of factors removed."""
        folded = 0
        for node in graph.nodes(model, "Mul", "Div"):
            change = _plan(node)
            if isinstance(change, scaling.Edit):
                scaling.apply_edit(model, change)
                graph.bypass(node, model, list(node.inputs).index(operand(node)))
                folded += 1
        return folded

    def refused(self, model: Model) -> Mapping[str, str]:
        """Factors beside a product of two computed tensors that stay: node name -> reason."""
        reasons = {str(node.name): _plan(node) for node in graph.nodes(model, "Mul", "Div") if _at_product(node)}
        return {name: reason for name, reason in reasons.items() if isinstance(reason, str) and reason}


def _plan(node: Node) -> scaling.Edit | str:
    """The new constants of the layer that takes the factor, why there is none, or "" where `node` is no factor."""
    affine = affine_of(node, Axis(0, 1))
    if isinstance(affine, str):
        return ""
    reach = _reach(affine.data, node, None)
    if isinstance(reach, str):
        return reach
    layer = reach.layer
    scale: Floats = np.where(reach.channels, affine.scale, 1.0)
    bias = None if layer.bias is None else scale * layer.bias
    return scaling.edit(layer, scaling.scaled_outputs(layer, scale), bias)


def _reach(value: Value, reader: Node, elements: Elements | None) -> _Reach | str:
    """The layer in front of `elements` of `value`, which `reader` reads; or why a factor cannot go there."""
    obstacle = _shared(value, reader, elements)
    if obstacle:
        return obstacle
    layer = scaling.layer_behind(value)
    if not isinstance(layer, str):
        return _channels(layer, elements)
    node = graph.producer(value)
    if node is None or node.domain not in ("", "ai.onnx"):
        return layer
    if _is_product(node) and elements is None:
        found = [_reach(operand, node, None) for operand in node.inputs if operand is not None]
        return next((reach for reach in found if isinstance(reach, _Reach)), found[0])
    data = node.inputs[0] if node.op_type in MOVES else None
    if data is None:
        return layer
    inside = behind(node, value, elements)
    return inside if isinstance(inside, str) else _reach(data, node, inside)


def _shared(value: Value, reader: Node, elements: Elements | None) -> str:
    """Who else reads `elements` of `value`, in words; "" for nobody."""
    if value.is_graph_output():
        return f"{value.name} is an output of the model"
    for use in value.uses():
        other = use.node
        alone = other is reader and reader.inputs.count(value) == 1
        if alone or other.op_type in ("Shape", "Size"):
            continue
        if other.graph is not reader.graph or other.op_type not in PICKS or use.idx:
            return f"{value.name} is read by {other.name}, too"
        for output in other.outputs:
            seen = behind(other, output, None)
            if isinstance(seen, str) or meet(seen, elements):
                return f"{value.name} is read by {other.name}, too"
    return ""


def _channels(layer: Layer, elements: Elements | None) -> _Reach | str:
    """The output channels that `elements` of the layer's result are."""
    axis = scaling.output_axis(layer)
    if elements is None:
        return _Reach(layer, np.ones(axis.channels, np.bool_))
    place = elements.ndim - 1 - axis.behind
    if elements.size != elements.shape[place]:
        return f"only some positions of {layer.node.name} are scaled"
    return _Reach(layer, np.broadcast_to(elements.reshape(-1), (axis.channels,)))


def _is_product(node: Node) -> bool:
    return node.op_type == "MatMul" and all(graph.constant(value) is None for value in node.inputs)


def _at_product(node: Node) -> bool:
    """Whether a product of two computed tensors is in front of `node`, or behind it with only moves in between."""
    before = graph.producer(operand(node))
    if before is not None and _is_product(before):
        return True
    after: Node | None = node
    while after is not None:
        after = graph.only_user(after.outputs[0])
        if after is not None and _is_product(after):
            return True
        if after is not None and after.op_type not in (*RESHAPES, "Transpose"):
            return False
    return False
