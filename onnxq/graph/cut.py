"""Sub-models between any values of a graph."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxq.graph.edit import forget_shapes, infer_shapes, redirect, remove_unused, unique_name
from onnxq.graph.look import value_map


def sub_model(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """A copy of `model` (sharing its weights) that computes the values `outputs` from the values `inputs`.

    The recorded shapes of its inputs and outputs are dropped, so that any batch size may be fed that the nodes allow.

    Args:
        model: Left as it is.
        inputs: Values to feed: graph inputs, results of nodes or initializers, in this order.
        outputs: Values to return, in this order. Nodes that none of them needs are removed.

    Raises:
        ValueError: The result would need a graph input that is not among `inputs`.
        KeyError: `model` has no such value.
    """
    copy = model.clone()
    values = value_map(copy)
    if any(values[name].type is None and values[name].const_value is None for name in inputs):
        infer_shapes(copy)
    ends = [values[name] for name in outputs]
    copy.graph.outputs.clear()
    entries = []
    for name in inputs:
        old = values[name]
        dtype = ir.DataType.FLOAT if old.const_value is None else old.const_value.dtype
        kind = old.type or ir.TensorType(dtype)  # no type is known behind an operator that onnx cannot infer
        old.name = unique_name(copy, f"{name}_inner")
        entry = ir.Value(name=name, type=kind)
        redirect(old, entry)
        ends = [entry if end is old else end for end in ends]
        entries.append(entry)
    fed = {entry.name for entry in entries}
    left = [value for value in copy.graph.inputs if value.name not in fed]
    copy.graph.inputs.clear()
    copy.graph.inputs.extend(entries)
    copy.graph.outputs.extend(ends)
    remove_unused(copy)
    missing = [value.name for value in left if value.uses() or value in ends]
    if missing:
        raise ValueError(f"the sub-model needs {', '.join(str(name) for name in missing)}")
    forget_shapes(copy)
    for end in ends:
        end.shape = None
    return copy
