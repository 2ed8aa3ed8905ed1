"""A model in which values can be rounded one at a time, decided anew in every run.

Chosen readers of a value get the result of an If: the value rounded to a grid when the run opens this gate, else the
value itself. All gates share four inputs that need not be fed: the number of the open gate, and its grid

    clip(round(x / step), lowest, highest) * step

with the outermost codes counted from the zero point.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.graph.edit import add_constant, redirect, unique_name
from onnxq.graph.look import value_map

INPUTS = ("onnxq_gate", "onnxq_step", "onnxq_lowest", "onnxq_highest")


def with_gates(model: ir.Model, readers: Mapping[str, Collection[str]]) -> ir.Model:
    """A copy of `model` (sharing its weights) with a gate at every value that `readers` names.

    Args:
        model: Left as it is.
        readers: Value name -> names of the nodes that read it through its gate. Gates are numbered in this order.
    """
    copy = model.clone()
    values = value_map(copy)
    shared = [add_constant(copy, name, array) for name, array in open_gate(-1, 1.0, 0, 0).items()]
    copy.graph.inputs.extend(shared)
    copy.ir_version = max(copy.ir_version, 4)  # before, what has a default cannot be fed
    for number, (name, nodes) in enumerate(readers.items()):
        choice, gate = _gate(copy, values[name], number, shared)
        maker = values[name].producer()
        if maker is None:
            copy.graph.insert_before(copy.graph[0], (choice, gate))
        else:
            copy.graph.insert_after(maker, (choice, gate))
        behind = {node for node in copy.graph if node.name in nodes}
        redirect(values[name], gate.outputs[0], behind.__contains__)
    return copy


def open_gate(number: int, step: float, lowest: int, highest: int) -> dict[str, npt.NDArray[Any]]:
    """What to feed to a model `with_gates` so that gate `number` is open in this run."""
    gate, *grid = INPUTS
    given = zip(grid, (step, lowest, highest), strict=True)
    return {gate: np.asarray(number, np.int64)} | {name: np.asarray(value, np.float32) for name, value in given}


def _gate(model: ir.Model, value: ir.Value, number: int, shared: Sequence[ir.Value]) -> tuple[ir.Node, ir.Node]:
    """The comparison of the gate's number with the open one's, and the If behind it."""
    chosen, step, lowest, highest = shared
    own = add_constant(model, f"{value.name}_gate", np.asarray(number, np.int64))
    choice = _node(model, "Equal", [chosen, own], ir.DataType.BOOL)
    steps = [_node(model, "Div", [value, step])]
    for op_type, others in (("Round", []), ("Clip", [lowest, highest]), ("Mul", [step])):
        steps.append(_node(model, op_type, [steps[-1].outputs[0], *others]))
    branches = {"then_branch": steps, "else_branch": [_node(model, "Identity", [value])]}
    attributes = [
        ir.AttrGraph(key, ir.Graph([], nodes[-1].outputs, nodes=nodes, name=f"{key}_{number}"))
        for key, nodes in branches.items()
    ]
    return choice, _node(model, "If", [choice.outputs[0]], attributes=attributes)


def _node(
    model: ir.Model,
    op_type: str,
    inputs: Sequence[ir.Value],
    dtype: ir.DataType = ir.DataType.FLOAT,
    attributes: Sequence[ir.Attr] = (),
) -> ir.Node:
    name = unique_name(model, f"gate_{op_type}")
    return ir.Node("", op_type, inputs, attributes, outputs=[ir.Value(name=name, type=ir.TensorType(dtype))], name=name)
