"""float16 for the nodes that carry the work; the file's inputs and outputs stay float32.

    x float32 -> Cast -> half nodes, float16 constants -> Cast -> float32 nodes, outputs

A Cast stands wherever a value crosses between the two kinds, one for all of its readers. What a half node reads from
initializers becomes float16. Which nodes those are is the plan's business.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxq import graph
from onnxq.graph import Model, Node, Value

FLOATS = {"Resize": (0,), "Clip": (0, 1, 2), "Pad": (0, 2), "MatMulNBits": (0, 2)}
"""Inputs of type T where others have a type of their own."""


def to_half(model: Model, names: Iterable[str]) -> None:
    """Let nodes compute in float16, in place.

    Args:
        model: Float32, shapes and types of what is computed not needed behind it.
        names: Nodes of the main graph whose operands of type T are float32.
    """
    nodes = graph.node_names(model)
    chosen = [nodes[name] for name in names]
    inside = set(chosen)
    narrow: dict[Value, Value] = {}
    for node in chosen:
        for index in _floats(node):
            value = node.inputs[index]
            assert value is not None
            if value.producer() not in inside:
                if value not in narrow:
                    narrow[value] = _narrowed(model, value, node)
                node.replace_input_with(index, narrow[value])
    for node in chosen:
        for output in node.outputs:
            if output.name:
                _widen(model, output, node, inside)


def _floats(node: Node) -> list[int]:
    """Inputs of type T that are there."""
    places = FLOATS.get(node.op_type, tuple(range(len(node.inputs))))
    return [
        at
        for at in places
        if at < len(node.inputs)
        and node.inputs[at] is not None
        and graph.dtype_name(node.inputs[at]) in (None, "float32")
    ]


def _narrowed(model: Model, value: Value, before: Node) -> Value:
    """`value` in float16: a constant stored so, anything else behind a Cast."""
    name = graph.name_of(value)
    array = graph.constant(value)
    if array is not None:
        return graph.add_constant(model, f"{name}_half", array.astype(np.float16))
    source = value.producer()
    first = None if source is not None else model.graph[0]
    attributes = {"to": graph.FLOAT16}
    return graph.add_node(model, "Cast", [value], f"{name}_half", before=first, after=source, attributes=attributes)


def _widen(model: Model, value: Value, node: Node, inside: set[Node]) -> None:
    """Give the readers of a half result that are not half nodes, and the graph's outputs, float32."""
    value.type = value.type if value.is_graph_output() else None
    readers = [user for user in graph.users(value) if user not in inside]
    if not readers and not value.is_graph_output():
        return
    attributes = {"to": graph.FLOAT32}
    wide = graph.add_node(model, "Cast", [value], f"{value.name}_wide", after=node, attributes=attributes)
    made = wide.producer()
    graph.redirect(value, wide, lambda user: user in readers and user is not made)
    if value.is_graph_output():
        graph.move_name(value, wide, model)
        value.type = value.shape = None
