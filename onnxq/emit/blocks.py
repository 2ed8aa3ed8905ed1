"""Weights in blocks of inputs, in the form that a target's products read.

onnxruntime on CPU, CUDA and in browsers: MatMulNBits (`nbits`). TensorRT: INT4 codes behind a DequantizeLinear with a
scale per block,

    W [K, N] int4 -> DequantizeLinear(steps [K / block, N], axis = 0, block_size = block) -> MatMul

which the operator set has from 21 on; K must be a multiple of the block.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.emit.nbits import BlockWeight, block_steps, round_blocks, store_blocks
from onnxq.errors import UnsupportedError
from onnxq.graph import Model, Node
from onnxq.types import BlockGrid
from onnxq.types.target import BLOCK_OPSET, Target


def block_weight(
    weight: npt.NDArray[np.float32], grid: BlockGrid, codes: npt.NDArray[np.int8] | None = None, *, signed: bool
) -> BlockWeight:
    """A weight [inputs, outputs] in blocks: with the nearest codes, or `codes` for the same steps."""
    if codes is None:
        return round_blocks(weight, grid.bits, grid.block, signed=signed)
    fitted = block_steps(weight, grid.bits, grid.block, signed=signed)
    return BlockWeight(codes, fitted, grid.bits, grid.block)


def emit_blocks(
    model: Model, node: Node, grid: BlockGrid, target: Target, codes: npt.NDArray[np.int8] | None = None
) -> None:
    """Store the weight of a MatMul in blocks, in place.

    Args:
        model: Holds the node.
        node: The product.
        grid: Bits and block.
        target: Decides the form.
        codes: Instead of the nearest ones, int8 [inputs, outputs]; for the same steps.

    Raises:
        UnsupportedError: It is no MatMul with a constant matrix, or the operator set has no blocks.
    """
    layer = graph.layer_of(node)
    if isinstance(layer, str) or node.op_type != "MatMul":
        raise UnsupportedError(f"{node.name!r} is no product with a constant matrix.")
    weight = block_weight(layer.weight, grid, codes, signed=target.nbits)
    if target.nbits:
        store_blocks(model, node, weight)
        return
    if not graph.raise_opset(model, BLOCK_OPSET):
        raise UnsupportedError(f"weights in blocks need opset {BLOCK_OPSET}; the model cannot be raised to it.")
    name = str(node.name)
    stored = graph.add_packed(model, f"{name}.weight_q", weight.codes)
    steps = graph.add_constant(model, f"{name}.weight_scale", weight.steps.astype(np.float32))
    attributes = {"axis": 0, "block_size": grid.block}
    restored = graph.add_node(
        model, "DequantizeLinear", [stored, steps], f"{name}.weight_dq", before=node, attributes=attributes
    )
    node.replace_input_with(1, restored)
