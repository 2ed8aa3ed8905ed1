"""Products and sums with constants, one for the tensor or one per channel, become part of the layers beside them.

    layer(x) * s + t    ->  layer'(x)      behind a Conv, ConvTranspose, Gemm or MatMul
    layer(x * s + t)    ->  layer'(x)      in front of one

with the weights and biases of `scaling`. In front of a Conv that pads, s alone can go: padding is zero before s as well
as after, but not before t. There a sequence of several such nodes, as preprocessing leaves it, becomes one Add, with
its factor in the weights:

    y = s x + t  =  s (x + t / s)

A BatchNormalization behind a layer is `FoldBatchNorm`'s. What several layers read is folded into all of them or stays.
The factors of a GELU stay, too: without its half, neither FuseGelu nor the runtime would know it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from onnxq import graph
from onnxq.graph import Layer, Model, Node, Value
from onnxq.passes import scaling
from onnxq.passes.affine import AFFINE_OPS, Affine, Axis, Floats, affine_of, operand
from onnxq.passes.base import Pass
from onnxq.passes.fuse_gelu import gelu_nodes

LARGEST_SHIFT = 1024.0
"""Largest t / s that is added instead of t: the sum x + t / s keeps 24 bits, and s makes their error s times larger."""


@dataclass(frozen=True)
class _Fold:
    """A sequence of nodes and what takes its place.

    Attributes:
        nodes: What disappears, the last one first.
        source: What the sequence reads.
        edits: The new constants of the layers that take its work.
        shift: What an Add in its place adds, in a shape that spreads over the channels; None adds nothing.
    """

    nodes: tuple[Node, ...]
    source: Value
    edits: tuple[scaling.Edit, ...]
    shift: Floats | None = None


@dataclass(frozen=True)
class FoldScale(Pass):
    """Fold constant scales and shifts into the layers behind and in front of them."""

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of sequences of nodes folded or shortened."""
        done, found = 0, True
        while found:
            found, held = False, gelu_nodes(model)
            for rule in (_into_layer_before, _into_layers_after, partial(_shortened, held=held)):
                for node in list(graph.nodes(model, *AFFINE_OPS)):
                    fold = rule(node) if node.graph is model.graph and node not in held else ""
                    if isinstance(fold, _Fold):
                        _write(model, fold)
                        done, found = done + 1, True
        return done

    def refused(self, model: Model) -> Mapping[str, str]:
        """Scales and shifts beside a layer that stay: node name -> reason."""
        reasons: dict[str, str] = {}
        held = gelu_nodes(model)
        for node in graph.nodes(model, *AFFINE_OPS):
            if node in held:
                continue
            found = [rule(node) for rule in (_into_layers_after, _into_layer_before)]
            reason = next((text for text in found if isinstance(text, str) and text), "")
            if reason:
                reasons[str(node.name)] = reason
        return reasons


def _into_layer_before(node: Node) -> _Fold | str:
    """How `node` goes into the layer it reads, why not, or "" when it reads none."""
    value = operand(node)
    layer = scaling.layer_behind(value)
    if value is None or isinstance(layer, str) or node.op_type == "BatchNormalization":
        return ""
    if graph.only_user(value) is not node:
        return f"the output of {layer.node.name} has another reader or is an output of the model"
    axis = scaling.output_axis(layer)
    affine = affine_of(node, axis)
    if isinstance(affine, str):
        return affine
    scale, shift = _spread(affine.scale, axis), _spread(affine.shift, axis)
    bias = shift if layer.bias is None else scale * layer.bias + shift
    keep = layer.bias is None and not shift.any()
    change = scaling.edit(layer, scaling.scaled_outputs(layer, scale), None if keep else bias)
    return change if isinstance(change, str) else _Fold((node,), value, (change,))


def _into_layers_after(node: Node) -> _Fold | str:
    """How `node` goes into the layers that read it, why not, or "" when none does."""
    layers = _readers(node)
    if isinstance(layers, str):
        return layers
    axis = scaling.input_axis(layers[0])
    affine = affine_of(node, axis)
    if isinstance(affine, str):
        return affine
    if affine.shift.any():
        reason = _shift_obstacle(layers)
        if reason:
            return reason
    edits = _edits(layers, _spread(affine.scale, axis), _spread(affine.shift, axis))
    return edits if isinstance(edits, str) else _Fold((node,), affine.data, edits)


def _shortened(node: Node, held: Collection[Node]) -> _Fold | str:
    """How a sequence that ends in `node`, in front of layers that cannot take its shift, becomes one Add.

    Nodes that are `held` are no part of it.
    """
    layers = _readers(node)
    if isinstance(layers, str):
        return layers
    if not _shift_obstacle(layers):
        return "it goes into the layers"
    axis = scaling.input_axis(layers[0])
    chain = _chain(node, axis, held)
    if len(chain) < 2:
        return "it is on its own"
    scale, shift = np.ones(axis.channels), np.zeros(axis.channels)
    for link in chain:
        shift = shift + scale * link.shift
        scale = scale * link.scale
    edits = _edits(layers, scale, np.zeros(axis.channels))
    if isinstance(edits, str):
        return edits
    nodes, source = tuple(link.node for link in chain), chain[-1].data
    if not shift.any():
        return _Fold(nodes, source, edits)
    if not scale.all() or np.abs(shift / scale).max() > LARGEST_SHIFT:
        return "its shift is too large beside its scale"
    moved = shift / scale
    uniform = bool((moved == moved[0]).all())
    return _Fold(nodes, source, edits, moved[0] if uniform else moved.reshape(-1, *[1] * axis.behind))


def _readers(node: Node) -> list[Layer] | str:
    """The layers that read `node`, in the same way; why there is something else, too; or "" when none does."""
    value = node.outputs[0]
    if operand(node) is None or _is_bias(node):
        return ""
    layers: list[Layer] = []
    other = "" if not value.is_graph_output() else "it is an output of the model, too"
    for use in value.uses():
        layer = graph.layer_of(use.node)
        if isinstance(layer, str):
            other = f"{use.node.name} reads it and cannot take it: {layer}"
        elif use.idx or use.node.graph is not node.graph:
            other = f"{use.node.name} reads it as something else than its data"
        else:
            layers.append(layer)
    if not layers or other:
        return other if layers else ""
    if len({scaling.input_axis(layer) for layer in layers}) > 1:
        return "the layers that read it take their channels from different axes"
    return layers


def _is_bias(node: Node) -> bool:
    """Whether a node is the Add that holds the bias of a MatMul."""
    layer = scaling.layer_behind(node.outputs[0])
    return not isinstance(layer, str) and layer.bias_add is node


def _shift_obstacle(layers: Sequence[Layer]) -> str:
    """Why the layers cannot take a shift in front of them; "" when they can."""
    for layer in layers:
        node = layer.node
        padded = any(graph.attribute(node, "pads", [0])) or (
            graph.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
        )
        if node.op_type == "ConvTranspose" or (node.op_type == "Conv" and padded):
            return f"{node.name} behind it pads with zeros, which its shift does not reach"
    if sum(layer.node.op_type == "MatMul" and layer.bias is None for layer in layers) > 1:
        return "several MatMul without a bias would each need an Add instead"
    return ""


def _edits(layers: Sequence[Layer], scale: Floats, shift: Floats) -> tuple[scaling.Edit, ...] | str:
    """New constants of the layers in front of which  scale * x + shift  disappears."""
    edits = []
    for layer in layers:
        bias: Floats | None = None
        if shift.any():
            bias = scaling.through(layer, shift) + (0.0 if layer.bias is None else layer.bias)
        change = scaling.edit(layer, scaling.scaled_inputs(layer, scale), bias)
        if isinstance(change, str):
            return change
        edits.append(change)
    return tuple(edits)


def _chain(node: Node, axis: Axis, held: Collection[Node]) -> list[Affine]:
    """`node` and the nodes of its kind in front of it that only feed the next one, the last one first."""
    chain: list[Affine] = []
    current: Node | None = node
    while current is not None and current not in held and not _is_bias(current):
        link = affine_of(current, axis)
        if isinstance(link, str):
            break
        chain.append(link)
        before = graph.producer(link.data, *AFFINE_OPS)
        current = before if before is not None and graph.only_user(link.data) is current else None
    return chain


def _spread(values: Floats, axis: Axis) -> Floats:
    return np.broadcast_to(values, (axis.channels,))


def _write(model: Model, fold: _Fold) -> None:
    last = fold.nodes[0]
    for change in fold.edits:
        scaling.apply_edit(model, change)
    if len(fold.nodes) == 1 and fold.shift is None:
        graph.bypass(last, model, list(last.inputs).index(operand(last)))
        return
    new = fold.source
    if fold.shift is not None:
        constant = graph.add_constant(model, f"{last.name}_shift", fold.shift.astype(np.float32))
        new = graph.add_node(model, "Add", [fold.source, constant], f"{last.name}_shifted", before=last)
        new.shape, new.type = last.outputs[0].shape, last.outputs[0].type
    graph.redirect(last.outputs[0], new)
    for node in fold.nodes:
        model.graph.remove(node, safe=True)
