"""The graph as a map: layers, and the nodes in which branches meet, with what flows between them.

Every other node is passed through: its result has the origins of what it reads. A node whose operands have different
origins is a junction, and an origin of its own.
"""

from __future__ import annotations

from onnxq import graph
from onnxq.graph import Model, Node
from onnxq.types.details import FlowNode


def flow(model: Model) -> tuple[FlowNode, ...]:
    """Inputs, layers and junctions in graph order.

    Args:
        model: The float graph; subgraphs count as what their node reads.
    """
    found: list[FlowNode] = []
    origins: dict[str, frozenset[int]] = {}

    def add(name: str, op_type: str, sources: frozenset[int]) -> frozenset[int]:
        found.append(FlowNode(name, op_type, tuple(sorted(sources))))
        return frozenset([len(found) - 1])

    for value in model.graph.inputs:
        origins[graph.name_of(value)] = add(graph.name_of(value), "input", frozenset())
    for node in model.graph:
        sources = frozenset().union(*(origins.get(name, frozenset()) for name in _read(node)))
        kept = node.op_type in graph.LAYER_OPS or len(sources) > 1
        if kept and sources:
            sources = add(str(node.name), node.op_type, sources)
        for output in node.outputs:
            if output.name:
                origins[output.name] = sources
    return _without_idle(found, [graph.name_of(value) for value in model.graph.outputs], origins)


def _read(node: Node) -> list[str]:
    return [str(value.name) for value in node.inputs if value is not None and value.name]


def _without_idle(
    found: list[FlowNode], outputs: list[str], origins: dict[str, frozenset[int]]
) -> tuple[FlowNode, ...]:
    """Only what reaches an output, numbered anew."""
    wanted: set[int] = set().union(*(origins.get(name, frozenset()) for name in outputs))
    for index in range(len(found) - 1, -1, -1):
        if index in wanted:
            wanted.update(found[index].sources)
    place = {old: new for new, old in enumerate(sorted(wanted))}
    return tuple(
        FlowNode(found[old].name, found[old].op_type, tuple(place[source] for source in found[old].sources))
        for old in sorted(wanted)
    )
