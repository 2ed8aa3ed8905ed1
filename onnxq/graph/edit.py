"""Changes to a graph, each of which leaves it valid. Arrays of initializers are never written to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from onnxq.graph.look import name_of

Attribute = int | float | str | Sequence[int] | Sequence[float]


def unique_name(model: ir.Model, wanted: str) -> str:
    """`wanted`, or `wanted_1`, `wanted_2`, ...: a name that no value or node of `model` has."""
    taken = _taken(model)
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name


def _taken(model: ir.Model) -> set[str]:
    """Names in use; kept in the model's unsaved metadata so that asking is not linear in the graph's size."""
    cached = model.meta.get("onnxq.names")
    if cached is None:
        cached = {name for graph in model.graphs() for name in graph.initializers}
        for graph in model.graphs():
            cached.update(name_of(value) for value in graph.inputs)
            for node in graph:
                cached.add(node.name)
                cached.update(output.name for output in node.outputs)
        model.meta["onnxq.names"] = cached
    names: set[str] = cached
    return names


def add_constant(model: ir.Model, name: str, array: npt.NDArray[Any], dtype: ir.DataType | None = None) -> ir.Value:
    """Register a new initializer under a unique name made from `name`; returns its value."""
    unique = unique_name(model, name)
    tensor = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), dtype=dtype, name=unique)
    value = ir.Value(name=unique, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def add_node(
    model: ir.Model,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    *,
    before: ir.Node | None = None,
    after: ir.Node | None = None,
    attributes: Mapping[str, Attribute] | None = None,
    domain: str = "",
    dtype: ir.DataType | None = None,
) -> ir.Value:
    """Insert a one-output node next to `before` or `after` (at the end when neither is given).

    Args:
        model: Edited in place.
        op_type: Operator.
        inputs: Its inputs.
        name: Wanted name of the node and of its output; made unique.
        before: The node is put in front of this one.
        after: The node is put behind this one.
        attributes: ONNX attributes.
        domain: Operator domain.
        dtype: Element type of the output, when known.

    Returns:
        The output value.
    """
    unique = unique_name(model, name)
    output = ir.Value(name=unique, type=ir.TensorType(dtype) if dtype is not None else None)
    attrs = [ir.convenience.convert_attribute(key, value) for key, value in (attributes or {}).items()]
    node = ir.Node(domain, op_type, inputs, attrs, outputs=[output], name=unique)
    if before is not None:
        model.graph.insert_before(before, node)
    elif after is not None:
        model.graph.insert_after(after, node)
    else:
        model.graph.append(node)
    return output


def add_wide_node(
    model: ir.Model, op_type: str, inputs: Sequence[ir.Value], names: Sequence[str], *, before: ir.Node
) -> tuple[ir.Value, ...]:
    """Insert a node of several outputs in front of `before`; returns these.

    Args:
        model: Edited in place.
        op_type: Operator of the standard domain.
        inputs: Its inputs.
        names: Wanted names of the outputs, the first one the node's, too; made unique.
        before: The node behind it.
    """
    outputs = [ir.Value(name=unique_name(model, name)) for name in names]
    model.graph.insert_before(before, ir.Node("", op_type, inputs, outputs=outputs, name=outputs[0].name))
    return tuple(outputs)


def redirect(
    old: ir.Value,
    new: ir.Value,
    where: Callable[[ir.Node], bool] | None = None,
    *,
    skip: ir.Node | None = None,
) -> int:
    """Make the readers of `old` read `new`; returns the number of inputs changed. Graph outputs stay.

    Args:
        old: Value read so far.
        new: Value to read.
        where: Only readers for which this holds.
        skip: A reader to leave alone (usually the node that computes `new` from `old`).
    """
    changed = 0
    for use in list(old.uses()):
        if use.node is skip or (where is not None and not where(use.node)):
            continue
        use.node.replace_input_with(use.idx, new)
        changed += 1
    return changed


def move_name(old: ir.Value, new: ir.Value, model: ir.Model) -> None:
    """Make `new` the graph output that `old` was, under the same name; `old` gets a fresh one."""
    name = name_of(old)
    old.name = unique_name(model, f"{name}_inner")
    new.name = name
    outputs = model.graph.outputs
    for index, output in enumerate(outputs):
        if output is old:
            new.type, new.shape = old.type, old.shape
            outputs[index] = new


def bypass(node: ir.Node, model: ir.Model, source: int = 0) -> bool:
    """Remove a one-output node whose readers can read its input `source` instead.

    Returns:
        False (and nothing changed) when the node connects a graph input, an initializer or another graph output
        directly with a graph output: the graph's interface must stay.
    """
    value, output = node.inputs[source], node.outputs[0]
    if value is None:
        return False
    if output.is_graph_output():
        if value.is_graph_input() or value.is_graph_output() or value.is_initializer():
            return False
        redirect(output, value)
        move_name(output, value, model)
    else:
        redirect(output, value)
    model.graph.remove(node, safe=True)
    return True


def remove_unused(model: ir.Model) -> None:
    """Remove nodes, initializers and opset imports that nothing reads."""
    removed = True
    while removed:
        branching = {node: bodies for node in model.graph if (bodies := list(_bodies(node)))}
        common.RemoveUnusedNodesPass()(model)
        removed = False
        for node, bodies in branching.items():
            if node.graph is None:  # what its bodies captured is not read any more
                removed = True
                for inner in [inner for body in bodies for inner in body.all_nodes()]:
                    for index in range(len(inner.inputs)):
                        inner.replace_input_with(index, None)
    model.meta.pop("onnxq.names", None)


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        for value in attribute.value if isinstance(attribute.value, tuple | list) else (attribute.value,):
            if isinstance(value, ir.Graph):
                yield value


def lift_constants(model: ir.Model) -> None:
    """Turn Constant nodes of the main graph into initializers."""
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    model.meta.pop("onnxq.names", None)


def forget_shapes(model: ir.Model) -> None:
    """Drop the recorded types and shapes of inner values: every runtime infers them, and they take space."""
    if any(node.domain not in ("", "ai.onnx") for graph in model.graphs() for node in graph):
        return
    for node in model.graph:
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = output.type = None


def tidy(model: ir.Model) -> None:
    """Give every node a unique name, inline functions, and drop initializers from the graph's inputs."""
    if model.functions:
        common.InlinePass()(model)
    common.RemoveInitializersFromInputsPass()(model)
    for index, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{index}"
    common.NameFixPass()(model)


def replace_constant(
    model: ir.Model, node: ir.Node, index: int, array: npt.NDArray[Any], name: str | None = None
) -> ir.Value:
    """Give `node` an initializer of its own at input `index`; other readers of the old one keep the old one.

    The new initializer takes over the old one's name when nothing else reads that. `name` is for an input that
    was absent.
    """
    old = node.inputs[index] if index < len(node.inputs) else None
    wanted = name_of(old) if old is not None else name or f"{node.name}_{index}"
    new = add_constant(model, wanted, array)
    if index >= len(node.inputs):
        node.resize_inputs(index + 1)
    node.replace_input_with(index, new)
    orphaned = old is not None and not old.uses() and not old.is_graph_output() and not old.is_graph_input()
    if orphaned and model.graph.initializers.get(wanted) is old:
        del model.graph.initializers[wanted]
        new.name = wanted
    return new


def infer_shapes(model: ir.Model) -> None:
    """Fill in the element types and shapes of values that onnx can infer; the rest stays unknown."""
    logging.getLogger("onnx_ir.passes.common.shape_inference").setLevel(logging.ERROR)  # a failure is no news
    common.ShapeInferencePass(check_type=False, strict_mode=False, data_prop=True)(model)


def set_attribute(node: ir.Node, name: str, value: int | float | str | Sequence[int] | Sequence[float] | None) -> None:
    """Give `node` the attribute `name`; None takes it away, which leaves the operator's default."""
    if value is None:
        node.attributes.pop(name, None)
    else:
        node.attributes[name] = ir.convenience.convert_attribute(name, value)


def set_initializer(model: ir.Model, name: str, array: npt.NDArray[Any]) -> None:
    """Give the initializer `name` another value of the same shape and type, for all its readers.

    Raises:
        ValueError: There is no such initializer, or the shape or type differs.
    """
    value = model.graph.initializers.get(name)
    if value is None or value.const_value is None:
        raise ValueError(f"there is no initializer {name}")
    old = value.const_value
    if tuple(old.shape) != array.shape or old.dtype != ir.DataType.from_numpy(array.dtype):
        raise ValueError(f"initializer {name} is {old.dtype} {list(old.shape)}, not {array.dtype} {list(array.shape)}")
    value.const_value = ir.Tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)
