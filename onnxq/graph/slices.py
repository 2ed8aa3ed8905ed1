"""Sub-models: the same weights, other inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxq.graph.look import name_of, value_map


def with_outputs(model: ir.Model, names: Sequence[str], *, keep: bool = True) -> ir.Model:
    """A copy of `model` (sharing its weights) that also returns the values called `names`.

    Args:
        model: Left as it is.
        names: Values to return, in this order, behind the model's own outputs; duplicates are dropped.
        keep: Keep the model's own outputs. Without them, nodes that none of `names` needs are removed.
    """
    copy = model.clone()
    values = value_map(copy)
    if not keep:
        copy.graph.outputs.clear()
    have = {output.name for output in copy.graph.outputs}
    for name in dict.fromkeys(names):
        if name not in have:
            copy.graph.outputs.append(values[name])
    if not keep:
        from onnxq.graph.edit import remove_unused

        remove_unused(copy)
    return copy


def cut_at_codes(model: ir.Model) -> tuple[ir.Model, dict[str, str]]:
    """A copy of a QDQ model, cut open at every QuantizeLinear.

    The codes of each QuantizeLinear become an output, and what read them reads a new input instead. What remains are
    independent islands of one kernel each (or a few float nodes), which a single run evaluates on given codes.

    Returns:
        The copy, and the name of the new input for each output that it takes the place of.
    """
    copy = model.clone()
    entries: dict[str, str] = {}
    for node in list(copy.graph):
        codes = node.outputs[0]
        if node.op_type != "QuantizeLinear" or codes.is_graph_output():
            continue
        zero = node.inputs[2]
        dtype = zero.const_value.dtype if zero is not None and zero.const_value is not None else ir.DataType.UINT8
        entry = ir.Value(name=f"{codes.name}__given", type=ir.TensorType(dtype))
        for use in list(codes.uses()):
            use.node.replace_input_with(use.idx, entry)
        codes.type = ir.TensorType(dtype)
        copy.graph.inputs.append(entry)
        copy.graph.outputs.append(codes)
        entries[name_of(codes)] = name_of(entry)
    return copy, entries
