"""Regions of the data flow between tensors that everything behind them depends on.

The flow graph has one vertex per node that computes activations and one per model input that feeds layers. Tensors
that are not float (shapes, indices, masks) carry no flow, nor do float tensors that reach layers only together with
what earlier layers computed (an attention mask): a region reads those beside its flow.

A vertex u *dominates* v when every path from the inputs to v passes u. The immediate dominator of v is the lowest
common ancestor, in the tree of dominators, of the vertices that v reads. The tensor of u is a *cut* when u dominates
all that can be reached from it, which holds exactly when

    min over all v reachable from u of depth(idom(v))  >=  depth(u) ,

because the first vertex on a path from u that escapes u has an immediate dominator above u. The *region* of a cut is
what it dominates down to the next cuts, one region per connected piece. Ancestors are found by jump pointers (Myers,
"An applicative random-access stack", 1983), in logarithmic time each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from onnxq import graph
from onnxq.graph import Graph, Model, Node, Value

ROOT = 0
"""The vertex in front of all inputs."""


@dataclass(eq=False)
class Region:
    """Nodes between cuts.

    Attributes:
        entry: The cut in front of it, None at the beginning of the flow.
        nodes: Positions of its nodes in the model's list of nodes, ascending.
    """

    entry: Value | None
    nodes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Flow:
    """The data flow of a model.

    Attributes:
        nodes: All nodes of the main graph, in order.
        taken: What each of them reads, captures of its subgraphs included.
        layers: Positions of the weighted ones.
        values: The values that carry flow.
        vertices: What each vertex is: the position of a node, or None for the root and for inputs.
        reads: The vertices that each vertex reads, all smaller than itself.
        tensors: The value that a vertex hands on, for vertices that hand on just one.
    """

    nodes: list[Node]
    taken: list[list[Value]]
    layers: frozenset[int]
    values: frozenset[Value]
    vertices: list[int | None]
    reads: list[list[int]]
    tensors: dict[int, Value]


def values_read(node: Node) -> list[Value]:
    """What a node of the main graph reads, constants and captures of its subgraphs included, each once."""
    found = {value: None for value in node.inputs if value is not None}
    for attr in node.attributes.values():
        for body in attr.value if isinstance(attr.value, tuple | list) else (attr.value,):
            if isinstance(body, Graph):
                found.update((value, None) for value in _captures(body) if value.graph is node.graph)
    return list(found)


def _captures(body: Graph) -> Iterator[Value]:
    for inner in body.all_nodes():
        yield from (value for value in inner.inputs if value is not None)
        for attr in inner.attributes.values():
            for nested in attr.value if isinstance(attr.value, tuple | list) else (attr.value,):
                if isinstance(nested, Graph):
                    yield from nested.outputs
    yield from body.outputs


def flow_of(model: Model) -> Flow:
    """Which values carry flow, and how; linear in the size of the graph."""
    nodes = list(graph.nodes(model))
    layers = frozenset(i for i, node in enumerate(nodes) if not isinstance(graph.layer_of(node), str))
    taken = [values_read(node) for node in nodes]
    values = _flowing(nodes, taken, layers)
    vertices: list[int | None] = [None]
    reads: list[list[int]] = [[]]
    vertex: dict[Value, int] = {}
    tensors: dict[int, Value] = {}
    for value in model.graph.inputs:
        if value in values:
            vertex[value] = len(vertices)
            tensors[len(vertices)] = value
            vertices.append(None)
            reads.append([ROOT])
    for position, node in enumerate(nodes):
        made = [value for value in node.outputs if value in values]
        if made:
            used = [value for value in made if value.uses() or value.is_graph_output()]
            if len(used) == 1:
                tensors[len(vertices)] = used[0]
            vertex.update((value, len(vertices)) for value in made)
            vertices.append(position)
            found = {vertex[value]: None for value in taken[position] if value in vertex and value not in made}
            reads.append(list(found) or [ROOT])
    return Flow(nodes, taken, layers, values, vertices, reads, tensors)


def _flowing(nodes: list[Node], taken: list[list[Value]], layers: frozenset[int]) -> frozenset[Value]:
    """Float values behind a layer, and those in front of the first layers that these alone are computed from."""
    behind: set[Value] = set()
    for position, node in enumerate(nodes):
        if position in layers or any(value in behind for value in taken[position]):
            behind.update(value for value in node.outputs if _is_float(value))
    before: set[Value] = set()
    for position in range(len(nodes) - 1, -1, -1):
        node = nodes[position]
        if position in layers:
            reads = taken[position][:1]
        elif any(value in before for value in node.outputs):
            reads = taken[position]
        else:
            continue
        before.update(value for value in reads if _is_float(value) and value not in behind)
    return frozenset(behind | {value for value in before if value.const_value is None})


def _is_float(value: Value) -> bool:
    name = graph.dtype_name(value)
    return name is None or "float" in name


class _Dominators:
    """Immediate dominators of a flow graph whose vertices are in topological order."""

    def __init__(self, reads: list[list[int]]) -> None:
        self.above = [ROOT] * len(reads)
        self.depth = [0] * len(reads)
        self._jump = [ROOT] * len(reads)
        for vertex in range(1, len(reads)):
            first, *others = reads[vertex]
            for other in others:
                first = self._common(first, other)
            self._hang(vertex, first)

    def _hang(self, vertex: int, parent: int) -> None:
        self.above[vertex] = parent
        self.depth[vertex] = self.depth[parent] + 1
        far = self._jump[parent]
        even = self.depth[parent] - self.depth[far] == self.depth[far] - self.depth[self._jump[far]]
        self._jump[vertex] = self._jump[far] if even else parent

    def _common(self, left: int, right: int) -> int:
        """The deepest vertex that dominates both."""
        if self.depth[left] < self.depth[right]:
            left, right = right, left
        while self.depth[left] > self.depth[right]:
            far = self._jump[left]
            left = far if self.depth[far] >= self.depth[right] else self.above[left]
        while left != right:
            if self._jump[left] != self._jump[right]:
                left, right = self._jump[left], self._jump[right]
            else:
                left, right = self.above[left], self.above[right]
        return left


def cuts_of(flow: Flow) -> tuple[dict[int, Value], list[int]]:
    """The cut tensors by vertex, and for each vertex the nearest cut above it (the root where there is none)."""
    tree = _Dominators(flow.reads)
    count = len(flow.vertices)
    escape = [count] * count
    for vertex in range(count - 1, 0, -1):
        lowest = min(escape[vertex], tree.depth[tree.above[vertex]])
        for source in flow.reads[vertex]:
            escape[source] = min(escape[source], lowest)
    cuts = {vertex: value for vertex, value in flow.tensors.items() if escape[vertex] >= tree.depth[vertex]}
    entry = [ROOT] * count
    for vertex in range(1, count):
        above = tree.above[vertex]
        entry[vertex] = above if above in cuts else entry[above]
    return cuts, entry


def regions_of(flow: Flow) -> list[Region]:
    """The regions of all cuts, ordered by their first nodes; each node of the flow is in exactly one."""
    cuts, entry = cuts_of(flow)
    joined = list(range(len(flow.vertices)))

    def find(vertex: int) -> int:
        while joined[vertex] != vertex:
            joined[vertex] = joined[joined[vertex]]
            vertex = joined[vertex]
        return vertex

    for vertex, position in enumerate(flow.vertices):
        if position is None:
            continue
        for source in flow.reads[vertex]:
            if flow.vertices[source] is not None and source != entry[vertex] and entry[source] == entry[vertex]:
                left, right = sorted((find(source), find(vertex)))
                joined[right] = left
    found: dict[int, Region] = {}
    for vertex, position in enumerate(flow.vertices):
        if position is not None:
            first = find(vertex)
            region = found.setdefault(first, Region(cuts.get(entry[vertex])))
            region.nodes.append(position)
    return list(found.values())
