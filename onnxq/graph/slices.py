"""Sub-models: the same weights, other inputs and outputs."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from onnxq.graph.look import value_map


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


def extract(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> ir.Model:
    """The part of `model` between the values `inputs` and `outputs`, with the initializers it needs.

    Raises:
        ValueError: `outputs` need a graph input that is not among `inputs`.
    """
    copy = model.clone()
    graph = ir.convenience.extract(copy.graph, list(inputs), list(outputs))
    return ir.Model(graph, ir_version=model.ir_version, producer_name=model.producer_name)
