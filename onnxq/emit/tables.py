"""Embedding tables in int8: a quarter of the bytes, and only the rows that are looked up are ever dequantized.

    Gather(table, ids)  ->  Mul(DequantizeLinear(Gather(codes, ids), 1), Gather(steps, ids))

codes [rows, width] int8, steps [rows, 1] float32 = max|row| / 127. Written as DequantizeLinear -> Gather the runtime
would dequantize the whole table at every call.
"""

from __future__ import annotations

import numpy as np

from onnxq import graph
from onnxq.graph import Model, Node
from onnxq.grid import SMALLEST_SCALE, Grid, quantize

GRID = Grid(8)


def store_table(model: Model, node: Node) -> None:
    """Rewrite a Gather of rows of a constant table in place."""
    table, ids = graph.constant(node.inputs[0]), node.inputs[1]
    assert table is not None
    steps = np.maximum(np.abs(table).max(axis=1) / np.float32(GRID.qmax), SMALLEST_SCALE).astype(np.float32)
    codes = quantize(table, steps, np.int32(0), GRID, axis=0).astype(np.int8)
    name = str(node.name)
    stored = graph.add_constant(model, f"{name}.weight_q", codes)
    scales = graph.add_constant(model, f"{name}.weight_scale", steps.reshape(-1, 1))
    one = graph.add_constant(model, f"{name}.weight_one", np.asarray(1.0, np.float32))
    zero = graph.add_constant(model, f"{name}.weight_zero_point", np.asarray(0, np.int8))
    rows = graph.add_node(model, "Gather", [stored, ids], f"{name}_rows", before=node)
    floats = graph.add_node(model, "DequantizeLinear", [rows, one, zero], f"{name}_dq", before=node)
    factors = graph.add_node(model, "Gather", [scales, ids], f"{name}_scales", before=node)
    result = graph.add_node(model, "Mul", [floats, factors], f"{name}_values", before=node)
    old = node.outputs[0]
    graph.redirect(old, result)
    graph.move_name(old, result, model)
    model.graph.remove(node, safe=True)
