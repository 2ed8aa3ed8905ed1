"""Nodes that return what they read disappear.

Identity, Dropout in inference, a Cast to the type its input has, a Concat, Sum, Mean, Max or Min of one
input, a Pad by nothing, a Transpose that keeps the order, a Reshape to the shape its input has; x + 0, x - 0,
x * 1, x / 1 and x ** 1 where the constant does not widen x by broadcasting. Of two reshapes in a row only the
last one counts:

    Reshape(Reshape(x, s), t) = Reshape(x, t)    unless t copies an axis (0) of the first result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from onnxq import graph
from onnxq.passes.base import Pass
from onnxq.types import Array

_RESHAPES = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class DropIdentity(Pass):
    """Remove nodes whose output equals one of their inputs, and reshapes that the next reshape undoes."""

    def __call__(self, model: graph.Model) -> int:
        """Rewrite `model` in place; returns the number of nodes removed or passed over."""
        dropped = 0
        for node in graph.nodes(model, *_KEPT_INPUT):
            kept = _KEPT_INPUT[node.op_type](node)
            if isinstance(kept, int) and _outputs_allow(node) and graph.bypass(node, model, kept):
                dropped += 1
        return dropped + sum(_skip_inner_reshape(node) for node in graph.nodes(model, "Reshape"))

    def refused(self, model: graph.Model) -> dict[str, str]:
        """Nodes that do nothing but stay: node name -> reason."""
        reasons: dict[str, str] = {}
        for node in graph.nodes(model, *_KEPT_INPUT):
            kept = _KEPT_INPUT[node.op_type](node)
            if isinstance(kept, str):
                reasons[str(node.name)] = kept
            elif kept is not None:
                reasons[str(node.name)] = (
                    "it joins an output of the model directly with an input, a constant or another output"
                    if _outputs_allow(node)
                    else "its second output is read"
                )
        return reasons


def _outputs_allow(node: graph.Node) -> bool:
    """Whether nothing reads any output but the first."""
    return not any(output.uses() or output.is_graph_output() for output in node.outputs[1:])


def _identity(node: graph.Node) -> int | str | None:
    return 0


def _dropout(node: graph.Node) -> int | str | None:
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is None:
        return 0
    mode = graph.constant(training)
    if mode is None:
        return "whether it is in training mode is computed"
    return "it is in training mode; export the model in evaluation mode" if mode.any() else 0


def _cast(node: graph.Node) -> int | str | None:
    source = node.inputs[0]
    if source is None or source.dtype is None:
        return None
    return 0 if int(source.dtype) == graph.attribute(node, "to", 0) else None


def _single_operand(node: graph.Node) -> int | str | None:
    return 0 if len(node.inputs) == 1 else None


def _pad(node: graph.Node) -> int | str | None:
    pads = graph.constant(node.inputs[1])
    return 0 if pads is not None and not pads.any() else None


def _transpose(node: graph.Node) -> int | str | None:
    order = graph.attribute(node, "perm", [0, 0])
    return 0 if order == sorted(set(order)) else None


def _reshape(node: graph.Node) -> int | str | None:
    """Every axis must be known to stay, but for one (-1) that the number of elements settles."""
    source, target = node.inputs[0], graph.constant(node.inputs[1])
    if source is None or source.shape is None or target is None or len(target) != len(source.shape):
        return None
    copies = not graph.attribute(node, "allowzero", 0)
    stays = [
        wanted == -1 or (wanted == 0 and copies) or (isinstance(size, int) and size == wanted)
        for size, wanted in zip(source.shape, target.tolist(), strict=True)
    ]
    return 0 if all(stays) else None


def _neutral(value: float, operands: tuple[int, ...]) -> Callable[[graph.Node], int | str | None]:
    """A rule for x op c = x: `value` is the neutral c, `operands` the places where it is neutral."""

    def rule(node: graph.Node) -> int | str | None:
        for index in operands:
            constant, other = graph.constant(node.inputs[index]), node.inputs[1 - index]
            if constant is None or other is None or constant.dtype.kind not in "fiu":
                continue
            if constant.size and (constant == value).all() and _keeps_shape(constant, other):
                return 1 - index
        return None

    return rule


def _keeps_shape(constant: Array, other: graph.Value) -> bool:
    """Whether broadcasting `other` with `constant` leaves the shape of `other`."""
    if constant.ndim == 0:
        return True
    if other.shape is None or len(other.shape) < constant.ndim:
        return False
    mine = other.shape[len(other.shape) - constant.ndim :]
    return all(size in (1, dim) for size, dim in zip(constant.shape, mine, strict=True))


def _skip_inner_reshape(node: graph.Node) -> bool:
    """Let a Reshape read what the reshape in front of it reads."""
    target = graph.constant(node.inputs[1])
    inner = graph.producer(node.inputs[0], *_RESHAPES)
    if target is None or inner is None or inner.domain not in ("", "ai.onnx") or inner.inputs[0] is None:
        return False
    if (target == 0).any() or np.prod(target) == 0:
        return False
    output = inner.outputs[0]
    node.replace_input_with(0, inner.inputs[0])
    if not output.uses() and not output.is_graph_output() and inner.graph is not None:
        inner.graph.remove(inner, safe=True)
    return True


_KEPT_INPUT: Mapping[str, Callable[[graph.Node], int | str | None]] = {
    "Identity": _identity,
    "Dropout": _dropout,
    "Cast": _cast,
    "Concat": _single_operand,
    "Sum": _single_operand,
    "Mean": _single_operand,
    "Max": _single_operand,
    "Min": _single_operand,
    "Pad": _pad,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Add": _neutral(0, (0, 1)),
    "Sub": _neutral(0, (1,)),
    "Mul": _neutral(1, (0, 1)),
    "Div": _neutral(1, (1,)),
    "Pow": _neutral(1, (1,)),
}
"""Operator -> which input its output equals, why it is left alone, or None when the node does something."""
