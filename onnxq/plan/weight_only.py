"""Weights in blocks and floats everywhere else: for products of few rows, whose time is that of reading the weights."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from onnxq import graph
from onnxq.graph import Model
from onnxq.plan.others import KEPT
from onnxq.plan.placement import place
from onnxq.types import BlockGrid, QuantPlan
from onnxq.types.target import Target

BLOCK = 32
"""Inputs that share a step."""
OTHER = "only products of MatMul with a constant matrix are stored in blocks"
SMALL = f"it has fewer than {BLOCK} inputs"


def weight_only_plan(
    model: Model, bits: Mapping[str, int], target: Target, *, keep_float: Collection[str] = ()
) -> QuantPlan:
    """The plan that stores the weights of MatMuls in blocks, and embedding tables in int8.

    Args:
        model: The prepared float model.
        bits: 4 or 8, of every layer by name.
        target: One whose blocks are those of MatMulNBits.
        keep_float: Nodes that stay as they are.
    """
    nodes = graph.node_names(model)
    blocks: dict[str, BlockGrid] = {}
    skipped: dict[str, str] = {}
    for name, count in bits.items():
        layer = graph.layer_of(nodes[name])
        if name in keep_float:
            skipped[name] = KEPT
        elif isinstance(layer, str) or layer.node.op_type != "MatMul":
            skipped[name] = layer if isinstance(layer, str) else OTHER
        elif len(layer.weight) < BLOCK:
            skipped[name] = SMALL
        else:
            blocks[name] = BlockGrid(count, BLOCK)
    return QuantPlan(
        target=target.name,
        source=graph.digest(model),
        tensors={},
        weights={},
        integer=(),
        skipped=skipped,
        tables=place(model, keep_float=keep_float, target=target).tables,
        blocks=blocks,
    )
