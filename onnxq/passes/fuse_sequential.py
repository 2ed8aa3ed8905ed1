"""A layer behind a layer with nothing in between becomes one layer, where that is no more work.

    Conv -> Conv                    ->  Conv              where padding allows it, see `branch_algebra`
    Gemm or MatMul (+ Add) -> same  ->  one of them       W = W1 W2,  b = b1 W2 + b2

Work is counted in multiplications per output position: outputs x inputs per group x taps of a Conv, times the number of
positions of the inner Conv for each of the outer one's, the product of the outer strides; inputs x outputs of a matrix.
So a 1x1 Conv in front of a 3x3 is taken in, and two 3x3 or a bottleneck of few channels are not: one kernel would
multiply more than both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxq import graph
from onnxq.graph import Layer, Model, Node
from onnxq.passes import scaling
from onnxq.passes.affine import Floats
from onnxq.passes.base import Pass
from onnxq.passes.branch_algebra import compose, composed_size
from onnxq.passes.branches import Branch, conv_branch, write_conv

_MATRICES = ("Gemm", "MatMul")


@dataclass(frozen=True)
class _Product:
    """Two matrix layers and the constants of the outer one when it does the work of both."""

    inner: Layer
    change: scaling.Edit


@dataclass(frozen=True)
class FuseSequential(Pass):
    """Fuse layers that follow one another directly."""

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of layers removed."""
        done, found = 0, True
        while found:
            found = False
            for node in list(graph.nodes(model, "Conv", *_MATRICES)):
                plan = _plan(node) if node.graph is model.graph else ""
                if isinstance(plan, str):
                    continue
                if isinstance(plan, Branch):
                    write_conv(model, node, plan)
                else:
                    _write_product(model, plan)
                done, found = done + 1, True
        return done

    def refused(self, model: Model) -> Mapping[str, str]:
        """Layers directly behind another one that stay: node name -> reason."""
        reasons = {str(node.name): _plan(node) for node in graph.nodes(model, "Conv", *_MATRICES)}
        return {name: reason for name, reason in reasons.items() if isinstance(reason, str) and reason}


def _plan(node: Node) -> Branch | _Product | str:
    """What `node` and the layer it reads become, why they stay, or "" when it reads no layer of its kind."""
    inner, outer = scaling.layer_behind(node.inputs[0]), graph.layer_of(node)
    if isinstance(inner, str) or isinstance(outer, str):
        return ""
    kinds = (inner.node.op_type, node.op_type)
    if kinds != ("Conv", "Conv") and not set(kinds) <= set(_MATRICES):
        return ""
    if graph.only_user(inner.output) is not node:
        return f"the output of {inner.node.name} has another reader or is an output of the model"
    return _convs(inner.node, node) if node.op_type == "Conv" else _matrices(inner, outer)


def _convs(first: Node, second: Node) -> Branch | str:
    inner, outer = conv_branch(first), conv_branch(second)
    if isinstance(inner, str) or isinstance(outer, str):
        return inner if isinstance(inner, str) else str(outer)
    apart = inner.cost * int(np.prod(outer.strides)) + outer.cost
    if composed_size(inner, outer) > apart:
        return _too_much(composed_size(inner, outer) / apart)
    return compose(inner, outer)


def _matrices(inner: Layer, outer: Layer) -> _Product | str:
    first, second = _matrix(inner), _matrix(outer)
    ratio = first.shape[0] * second.shape[1] / (first.size + second.size)
    if ratio > 1:
        return _too_much(ratio)
    bias: Floats | None = None
    if inner.bias is not None:
        bias = inner.bias @ second + (0.0 if outer.bias is None else outer.bias)
    product = first @ second
    change = scaling.edit(outer, product.T if outer.axis == 0 else product, bias)
    return change if isinstance(change, str) else _Product(inner, change)


def _too_much(ratio: float) -> str:
    return f"one layer would multiply {ratio:.2f} times as much as the two"


def _matrix(layer: Layer) -> Floats:
    """The weight as [inputs, outputs], float64."""
    weight = layer.weight.astype(np.float64)
    return weight.T if layer.axis == 0 else weight


def _write_product(model: Model, plan: _Product) -> None:
    plan.change.layer.node.replace_input_with(0, plan.inner.data)
    scaling.apply_edit(model, plan.change)
    if plan.inner.bias_add is not None:
        model.graph.remove(plan.inner.bias_add, safe=True)
    model.graph.remove(plan.inner.node, safe=True)
