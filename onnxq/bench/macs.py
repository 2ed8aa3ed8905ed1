"""Multiply-accumulates of matrix nodes, from weights and the shapes seen at run time.

    convolution               every output element sums (Cin / groups) * kernel products:    out * W[0].size
    transposed convolution    every input element feeds (Cout / groups) * kernel outputs:    in * W[0].size
    Gemm, MatMul              every output element sums K products:                          out * K

with W[0].size the number of elements behind the first axis of the weight. Integer forms of these operators,
as in files that others have quantized, count like the float ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from onnxq import graph

Shape = tuple[int, ...]


@dataclass(frozen=True)
class MatrixOp:
    """Where a matrix operator has its operands.

    Attributes:
        kind: How its multiply-accumulates count.
        left: Input index of the activations.
        right: Input index of the weight (or of the second activation).
        integer: Whether it computes on integers.
    """

    kind: Literal["conv", "deconv", "gemm", "matmul", "nbits"]
    left: int = 0
    right: int = 1
    integer: bool = False


MATRIX_OPS: Mapping[str, MatrixOp] = {
    "Conv": MatrixOp("conv"),
    "FusedConv": MatrixOp("conv"),
    "ConvTranspose": MatrixOp("deconv"),
    "Gemm": MatrixOp("gemm"),
    "MatMul": MatrixOp("matmul"),
    "QLinearConv": MatrixOp("conv", right=3, integer=True),
    "ConvInteger": MatrixOp("conv", integer=True),
    "QGemm": MatrixOp("gemm", right=3, integer=True),
    "QLinearMatMul": MatrixOp("matmul", right=3, integer=True),
    "MatMulInteger": MatrixOp("matmul", integer=True),
    "MatMulIntegerToFloat": MatrixOp("matmul", integer=True),
    "DynamicQuantizeMatMul": MatrixOp("matmul", integer=True),
    "MatMulNBits": MatrixOp("nbits"),
}
"""Operators whose work is counted, of all domains."""
_SHAPE_KEEPING = ("DequantizeLinear", "QuantizeLinear", "Cast", "Identity")


def matrix_nodes(model: graph.Model) -> Iterator[tuple[graph.Node, MatrixOp]]:
    """The nodes of the main graph whose work is counted."""
    for node in graph.nodes(model):
        op = MATRIX_OPS.get(node.op_type)
        if op is not None:
            yield node, op


def matrix_tensors(model: graph.Model) -> list[str]:
    """Tensors whose run-time shapes `float_macs` needs: they may include inputs of the model."""
    needed: dict[str, None] = {}
    for node, op in matrix_nodes(model):
        for value in _needed(node, op):
            needed[graph.name_of(value)] = None
    return list(needed)


def _needed(node: graph.Node, op: MatrixOp) -> Iterator[graph.Value]:
    """Values whose shape the weights do not tell."""
    left, right = node.inputs[op.left], node.inputs[op.right]
    if op.kind == "deconv" and left is not None:
        yield left
    else:
        yield node.outputs[0]
    if op.kind == "matmul":
        if static_shape(left) is None and static_shape(right) is None and left is not None:
            yield left
    elif op.kind != "nbits" and right is not None and static_shape(right) is None:
        yield right


def static_shape(value: graph.Value | None) -> Shape | None:
    """Shape of a constant, also behind a DequantizeLinear or Cast; None for anything computed."""
    while value is not None:
        if value.const_value is not None and not value.is_graph_input():
            return tuple(value.const_value.shape.numpy())
        node = graph.producer(value, *_SHAPE_KEEPING)
        value = node.inputs[0] if node is not None else None
    return None


def float_macs(model: graph.Model, shapes: Mapping[str, Shape], rows: int) -> dict[str, int]:
    """Multiply-accumulates per row of every Conv, ConvTranspose, Gemm and MatMul, by node name.

    Args:
        model: A float model; integer forms of the operators count too.
        shapes: Run-time shapes of at least `matrix_tensors(model)`.
        rows: Rows of the batch in which the shapes were seen.
    """
    return {str(node.name): round(_work(node, op, shapes) / rows) for node, op in matrix_nodes(model)}


def weight_macs(model: graph.Model) -> dict[str, int]:
    """Weight elements by node name: the work when every weight is used once, where no shapes are known."""
    return {
        str(node.name): graph.attribute(node, "K", 0) * graph.attribute(node, "N", 0)
        if op.kind == "nbits"
        else math.prod(static_shape(node.inputs[op.right]) or static_shape(node.inputs[op.left]) or (0,))
        for node, op in matrix_nodes(model)
    }


def _work(node: graph.Node, op: MatrixOp, shapes: Mapping[str, Shape]) -> int:
    def shape(value: graph.Value | None) -> Shape:
        return static_shape(value) or shapes[graph.name_of(value)]

    left, right = node.inputs[op.left], node.inputs[op.right]
    if op.kind == "deconv":
        return math.prod(shape(left)) * math.prod(shape(right)[1:])
    out = math.prod(shape(node.outputs[0]))
    if op.kind == "conv":
        return out * math.prod(shape(right)[1:])
    if op.kind == "gemm":
        return out * shape(right)[1 if graph.attribute(node, "transB", 0) else 0]
    if op.kind == "nbits":
        return out * graph.attribute(node, "K", 0)
    constant = static_shape(right)
    if constant is None:
        return out * shape(left)[-1]
    return out * constant[-2 if len(constant) > 1 else 0]
