"""Questions about a graph. Nothing here changes it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

T = TypeVar("T")
STANDARD = ("", "ai.onnx")


def nodes(model: ir.Model, *op_types: str) -> Iterator[ir.Node]:
    """Nodes of the main graph in order, of the standard domain when `op_types` are given.

    onnxruntime's own QuantizeLinear and DequantizeLinear, which take 16 bits in any opset, count as standard ones.
    It is safe to insert and remove nodes while iterating.
    """
    for node in model.graph:
        rounds = node.domain == "com.microsoft" and node.op_type in ("QuantizeLinear", "DequantizeLinear")
        if not op_types or (node.op_type in op_types and (node.domain in STANDARD or rounds)):
            yield node


def name_of(value: ir.Value | None) -> str:
    """Name of a value that must have one."""
    if value is None or not value.name:
        raise ValueError("a value without a name")
    return value.name


def node_names(model: ir.Model) -> dict[str, ir.Node]:
    """Main-graph nodes by name. Loading gives every node a unique one."""
    return {cast(str, node.name): node for node in model.graph}


def value_map(model: ir.Model) -> dict[str, ir.Value]:
    """Values of the main graph by name: inputs, initializers and node outputs."""
    graph = model.graph
    found = {name_of(value): value for value in graph.inputs}
    found.update(graph.initializers)
    for node in graph:
        found.update((output.name, output) for output in node.outputs if output.name)
    return found


def users(value: ir.Value) -> list[ir.Node]:
    """Nodes that read `value`, each once, nodes of subgraphs included."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def only_user(value: ir.Value) -> ir.Node | None:
    """The single node that reads `value` (once), if `value` is no graph output and the node lives in the same graph."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    return uses[0].node if uses[0].node.graph is value.graph else None


def producer(value: ir.Value | None, *op_types: str) -> ir.Node | None:
    """The node that makes `value`, if it is of one of `op_types` (of any type when none are given)."""
    node = value.producer() if value is not None else None
    if node is None or (op_types and node.op_type not in op_types):
        return None
    return node


def constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The array of an initializer (never write to it), or None for anything computed or fed."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return value.const_value.numpy()


def attribute(node: ir.Node, name: str, default: T) -> T:
    """Value of an attribute; integer and float lists come as lists, strings as str."""
    attr = node.attributes.get(name)
    if attr is None:
        return default
    value = attr.value
    if isinstance(value, tuple):
        value = list(value)
    return cast(T, value)


def opset(model: ir.Model) -> int:
    """Version of the standard operator set."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))


def dtype_name(value: ir.Value | None) -> str | None:
    """The numpy name of a value's element type, None when unknown."""
    if value is None:
        return None
    if value.dtype is not None:
        return _numpy_name(value.dtype)
    return str(value.const_value.numpy().dtype) if value.const_value is not None else None


def _numpy_name(dtype: ir.DataType) -> str:
    try:
        return str(np.dtype(dtype.numpy()))
    except TypeError:
        return dtype.name.lower()


def input_specs(model: ir.Model) -> list[tuple[str, str, tuple[int | str | None, ...]]]:
    """(name, dtype, shape) of each graph input that is not an initializer."""
    return [
        (name_of(value), dtype_name(value) or "float32", tuple(_size(dim) for dim in value.shape or ()))
        for value in model.graph.inputs
        if not value.is_initializer()
    ]


def _size(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value or None
