"""As few Transposes between channels-first and channels-last as possible (models that come from TensorFlow).

Exporters wrap each Conv and pool of a channels-last model in Transposes and leave everything between in the layout it
had. Every operator of `layouts` works in either layout, so each may be re-laid, and a Transpose is needed only where
one side of a tensor (who makes it, who reads it) has been re-laid and another has not:

    Transpose(Relu(Transpose(x, 0 2 3 1)), 0 3 1 2)  ->  Relu(x)

Which operators to re-lay so that the fewest tensors are torn is a minimum cut. For one permutation p: each operator
that can be re-laid is a vertex; a tensor is a hyperedge over its maker and its readers; a maker Transpose(p^-1) and a
reader Transpose(p) are the sink, as they offer and want the tensor in the new layout; every other node, an input and
an output of the model are the source. A torn tensor costs one Transpose, or next to nothing where the axes that change
places have size 1: that is a Reshape. The pass rewrites only when the cut is smaller than the number of Transposes
there are; of equal cuts it takes the one that re-lays least.

The layouts of the model's inputs and outputs are its contract and stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from onnxq import graph
from onnxq.graph import Model, Node, Value
from onnxq.passes.base import Pass
from onnxq.passes.layouts import Perm, Relaid, rank_of, relaid
from onnxq.passes.min_cut import SINK, SOURCE, Edge, Pin, torn_least

RANKS = (4, 5)
"""Pictures and volumes. With three axes the two permutations are one, which attention uses for other ends."""


@dataclass(frozen=True)
class ChannelsFirst(Pass):
    """Remove Transposes between channels-last and channels-first by re-laying the operators between them."""

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of Transposes removed."""
        if not any(_transposes(model, perm) for perm in _permutations()):
            return 0
        removed = 0
        while (fewer := sum(_relay(model, perm) for perm in _permutations()) or _reshape_instead(model)) > 0:
            removed += fewer
        return removed

    def refused(self, model: Model) -> Mapping[str, str]:
        """Transposes between the two layouts that stay: node name -> reason."""
        return {str(node.name): _why(model, node) for perm in _permutations() for node in _transposes(model, perm)}


def _permutations() -> Iterator[Perm]:
    for rank in RANKS:
        to_first = (0, rank - 1, *range(1, rank - 1))
        yield to_first
        yield _inverse(to_first)


def _inverse(perm: Perm) -> Perm:
    return tuple(perm.index(axis) for axis in range(len(perm)))


def _perm_of(node: Node | None) -> Perm | None:
    if node is None or node.op_type != "Transpose" or node.domain not in ("", "ai.onnx"):
        return None
    return tuple(graph.attribute(node, "perm", list[int]()))


def _wants(node: Node, value: Value, perm: Perm) -> bool:
    """Whether `node` is a Transpose of `value` by `perm`, and not in a subgraph."""
    return _perm_of(node) == perm and node.graph is value.graph


def _transposes(model: Model, perm: Perm) -> list[Node]:
    return [node for node in graph.nodes(model, "Transpose") if _perm_of(node) == perm]


def _reshape_shape(value: Value, perm: Perm) -> list[int] | None:
    """The shape of Transpose(value, perm) for a Reshape, if one does the same: all axes that are not 1 keep order."""
    if value.shape is None or len(value.shape) != len(perm):
        return None
    sizes = [size if isinstance(size, int) else -1 for size in value.shape]
    moving = [axis for axis in perm if sizes[axis] != 1]
    if moving != sorted(moving) or sizes.count(-1) > 1 or 0 in sizes:
        return None
    return [sizes[axis] for axis in perm]


def _reshape_instead(model: Model) -> int:
    """Transposes that only move axes of size 1 become Reshapes."""
    count = 0
    for perm in _permutations():
        for node in _transposes(model, perm):
            value, old = node.inputs[0], node.outputs[0]
            shape = _reshape_shape(value, perm) if value is not None else None
            if value is None or shape is None:
                continue
            new = _convert(model, value, perm)
            graph.redirect(old, new)
            if old.is_graph_output():
                graph.move_name(old, new, model)
            model.graph.remove(node, safe=True)
            count += 1
    return count


def _convert(model: Model, value: Value, perm: Perm) -> Value:
    """`value` in the layout `perm`, computed right behind it."""
    maker = value.producer()
    first = next(iter(model.graph)) if maker is None else None
    shape = _reshape_shape(value, perm)
    if shape is not None:
        target = graph.add_constant(model, f"{value.name}_shape", np.array(shape, np.int64))
        inputs, name, op_type = [value, target], f"{value.name}_reshape", "Reshape"
        new = graph.add_node(model, op_type, inputs, name, before=first, after=maker, dtype=value.dtype)
    else:
        new = graph.add_node(
            model,
            "Transpose",
            [value],
            f"{value.name}_transpose",
            before=first,
            after=maker,
            attributes={"perm": list(perm)},
            dtype=value.dtype,
        )
    _lay_shape(new, value, perm)
    return new


def _lay_shape(target: Value, value: Value, perm: Perm) -> None:
    """Record for `target` the shape of `value` in the layout `perm`."""
    if value.shape is not None:
        target.shape = type(value.shape)([value.shape[axis] for axis in perm])


def _free(model: Model, perm: Perm) -> dict[Node, Relaid]:
    """The nodes that can be re-laid."""
    found = ((node, relaid(model, node, perm)) for node in graph.nodes(model))
    return {node: how for node, how in found if how is not None}


def _relay(model: Model, perm: Perm) -> int:
    """Re-lay the best set of nodes for one permutation; returns how many Transposes that saves."""
    back = _inverse(perm)
    before = len(_transposes(model, perm)) + len(_transposes(model, back))
    _cancel(model, perm)
    free = _free(model, perm)
    values = _values(free, _transposes(model, back), _transposes(model, perm))
    edges = [
        Edge(_pins(value, free, perm), len(values) if _reshape_shape(value, perm) is None else 1) for value in values
    ]
    chosen = torn_least(edges)
    _rewrite(model, perm, {node: how for node, how in free.items() if node in chosen})
    graph.remove_unused(model)
    return before - len(_transposes(model, perm)) - len(_transposes(model, back))


def _cancel(model: Model, perm: Perm) -> None:
    """Drop Transposes that undo the one before."""
    for node in _transposes(model, perm):
        maker = graph.producer(node.inputs[0])
        if maker is not None and _perm_of(maker) == _inverse(perm):
            node.replace_input_with(0, maker.inputs[0])
            _drop(model, node)


def _values(free: Mapping[Node, Relaid], entering: list[Node], leaving: list[Node]) -> list[Value]:
    """Every tensor with a layout that a free node or one of the Transposes touches, each once."""
    found: dict[Value | None, None] = {}
    for node, how in free.items():
        found.update((node.inputs[index], None) for index in how.data)
        if how.outputs:
            found.update((output, None) for output in node.outputs)
    found.update((node.outputs[0], None) for node in entering)
    found.update((node.inputs[0], None) for node in leaving)
    return [value for value in found if value is not None and graph.constant(value) is None]


def _pins(value: Value, free: Mapping[Node, Relaid], perm: Perm) -> tuple[Pin, ...]:
    """Maker and readers of a tensor as vertices of the cut."""
    maker = value.producer()
    made = free.get(maker) if maker is not None else None
    if _perm_of(maker) == _inverse(perm):
        pins: list[Pin] = [SINK]
    else:
        pins = [maker if made is not None and made.outputs else SOURCE]
    for use in value.uses():
        how = free.get(use.node)
        if _wants(use.node, value, perm):
            pins.append(SINK)
        else:
            pins.append(use.node if how is not None and use.idx in how.data else SOURCE)
    return (*pins, SOURCE) if value.is_graph_output() else tuple(pins)


def _rewrite(model: Model, perm: Perm, free: Mapping[Node, Relaid]) -> None:
    """Re-lay the nodes of `free`, and convert what is torn."""
    made = {output for node, how in free.items() if how.outputs for output in node.outputs}
    inside = {(node, index) for node, how in free.items() for index in how.data if node.inputs[index] in made}
    converted: dict[Value, Value] = {}
    for node, how in free.items():
        for index in how.data:
            value = node.inputs[index]
            if value is None or value in made:
                continue
            if value not in converted:
                converted[value] = _in_layout(model, value, perm)
            node.replace_input_with(index, converted[value])
        how.rewrite(model)
    for value in made:
        _fix_readers(model, value, perm, inside)


def _in_layout(model: Model, value: Value, perm: Perm) -> Value:
    """`value` in the layout `perm`, for all who want it so."""
    array, maker = graph.constant(value), value.producer()
    if array is not None:
        return graph.add_constant(model, f"{value.name}_laid", array.transpose(perm))
    if maker is not None and _perm_of(maker) == _inverse(perm) and maker.inputs[0] is not None:
        return maker.inputs[0]
    leaving = [node for node in graph.users(value) if _wants(node, value, perm)]
    new = _convert(model, value, perm)
    for node in leaving:
        node.replace_input_with(0, new)
        _drop(model, node)
    return new


def _fix_readers(model: Model, value: Value, perm: Perm, inside: set[tuple[Node, int]]) -> None:
    """`value` is in the new layout now: readers that want the old one get it, Transposes to the new one go.

    Inputs `inside` take it in the new layout. A re-laid node may also read it past a Transpose the other way: then it
    wants the old one.
    """
    shape = value.shape
    _lay_shape(value, value, perm)
    leaving = [node for node in graph.users(value) if _wants(node, value, perm)]
    others = [use for use in value.uses() if use.node not in leaving and (use.node, use.idx) not in inside]
    if others or value.is_graph_output():
        old = _convert(model, value, _inverse(perm))
        for use in others:
            use.node.replace_input_with(use.idx, old)
        if value.is_graph_output():
            graph.move_name(value, old, model)
            old.shape = shape
    for node in leaving:
        _drop(model, node)


def _drop(model: Model, node: Node) -> None:
    """Remove a Transpose whose input has the right layout; an Identity takes its place where there has to be a node."""
    if not graph.bypass(node, model):
        old = node.outputs[0]
        new = graph.add_node(model, "Identity", [node.inputs[0]], f"{node.name}_same", before=node, dtype=old.dtype)
        graph.redirect(old, new)
        graph.move_name(old, new, model)
        model.graph.remove(node, safe=True)


def _why(model: Model, node: Node) -> str:
    """Why a Transpose between the two layouts stays."""
    value, output = node.inputs[0], node.outputs[0]
    if value is not None and value.is_graph_input():
        return "the layout of the model's input stays"
    if output.is_graph_output():
        return "the layout of the model's output stays"
    perm = _perm_of(node)
    assert perm is not None
    if rank_of(value) is None:
        return "the rank of its input is not known"
    fixed = [user for user in graph.users(output) if relaid(model, user, _inverse(perm)) is None]
    if fixed:
        return f"{fixed[0].name} ({fixed[0].op_type}) needs its layout"
    return "moving it would not make the Transposes fewer"
