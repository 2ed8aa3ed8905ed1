"""Which nodes compute in float16, and which weights are stored in blocks, for targets without integer kernels.

float16 has 11 significant bits and ends at 65504. Layers and products become half, and so does what lies between them
and only moves, adds, scales or activates. What sums many squares or exponentials (normalisations, Softmax, means) stays
in float32, and so does every node that touches a tensor whose values come near the end, or a constant that float16
cannot hold (a mask of -1e9).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import numpy as np

from onnxq import graph
from onnxq.graph import Model, Node, Value
from onnxq.plan.others import KEPT
from onnxq.plan.units import SHAPES
from onnxq.types import BlockGrid, QuantPlan
from onnxq.types.target import BLOCK_OPSET, Target

LARGEST = 16384.0
"""A quarter of what float16 holds: other rows may show larger values than calibration did."""
CLOSE = 2.0**-9
"""Relative error that a constant may have in float16: four times its rounding."""
LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
SAFE = {
    *LAYERS, "Add", "Sub", "Mul", "Relu", "LeakyRelu", "PRelu", "Clip", "Elu", "Sigmoid", "Tanh", "Gelu", "HardSwish",
    "HardSigmoid", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Concat", "Split", "Reshape",
    "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Expand", "Tile", "DepthToSpace", "SpaceToDepth",
    "Resize", "Pad",
}  # fmt: skip
"""Operators whose results float16 rounds, and no more."""
SINGLE = "it stays in float32, which it needs or which costs nothing"


def half_plan(
    model: Model,
    ranges: Mapping[str, tuple[float, float]],
    target: Target,
    *,
    keep_float: Collection[str] = (),
    blocks: Mapping[str, BlockGrid] | None = None,
) -> QuantPlan:
    """The plan of a target that computes in float16.

    Args:
        model: The prepared float model.
        ranges: (smallest, largest) of float tensors by name; nodes at others stay in float32.
        target: Recorded.
        keep_float: Nodes that stay in float32.
        blocks: Weights to be stored in blocks.
    """
    chosen: dict[Node, None] = {}
    skipped: dict[str, str] = {}
    for node in graph.nodes(model):
        reason = KEPT if node.name in keep_float else _reason(node, ranges)
        if reason:
            skipped[str(node.name)] = reason
        else:
            chosen[node] = None
    for group in _groups(chosen):
        if not any(node.op_type in LAYERS for node in group):
            for node in group:
                skipped[str(node.name)] = SINGLE
                del chosen[node]
    half = tuple(str(node.name) for node in chosen)
    stored = {name: grid for name, grid in (blocks or {}).items() if name in set(half)}
    return QuantPlan(
        target=target.name,
        source=graph.digest(model),
        tensors={},
        weights={},
        integer=(),
        skipped=skipped,
        blocks=stored,
        half=half,
    )


def block_layers(model: Model, target: Target, wanted: Iterable[str]) -> dict[str, BlockGrid]:
    """Those of the layers `wanted` whose weights the target reads in blocks of 4 bits: products with a matrix."""
    nodes = graph.node_names(model)
    found: dict[str, BlockGrid] = {}
    if target.placing != "half" and not graph.raise_opset(model.clone(), BLOCK_OPSET):
        return found
    for name in wanted:
        layer = graph.layer_of(nodes[name])
        if target.block and not isinstance(layer, str) and layer.node.op_type == "MatMul":
            whole = len(layer.weight) % target.block == 0 or target.placing == "half"
            if whole and len(layer.weight) >= target.block:
                found[name] = BlockGrid(4, target.block)
    return found


def _reason(node: Node, ranges: Mapping[str, tuple[float, float]]) -> str:
    """Why a node stays in float32; "" where it need not."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in SAFE:
        return SINGLE
    for value in _floats(node):
        array = graph.constant(value)
        if array is not None:
            if array.dtype == np.float32 and not _fits(array):
                return f"float16 cannot hold its constant operand {value.name}"
            continue
        if graph.dtype_name(value) not in (None, "float32"):
            return SHAPES
        if value.name not in ranges:
            return f"nothing is known about the range of {value.name}"
        low, high = ranges[str(value.name)]
        if max(-low, high) > LARGEST:
            return f"values of {value.name} reach {max(-low, high):.3g}, near the end of float16"
    return ""


def _floats(node: Node) -> Iterator[Value]:
    """Operands and results that would be float16."""
    for value in (*node.inputs, *node.outputs):
        if value is None or not value.name:
            continue
        name = graph.dtype_name(value)
        if name in (None, "float32") or value in node.outputs or value is node.inputs[0]:
            yield value


def _fits(array: np.ndarray) -> bool:
    """Whether float16 keeps a constant."""
    with np.errstate(over="ignore"):
        error = np.linalg.norm((array.astype(np.float16).astype(np.float64) - array).reshape(-1))
    return bool(error <= CLOSE * np.linalg.norm(array.astype(np.float64).reshape(-1)))


def _groups(chosen: Mapping[Node, None]) -> Iterator[list[Node]]:
    """Connected parts of the half nodes."""
    left = dict(chosen)
    while left:
        first = next(iter(left))
        del left[first]
        group, waiting = [first], [first]
        while waiting:
            node = waiting.pop()
            beside = [graph.producer(value) for value in node.inputs]
            beside += [user for output in node.outputs for user in graph.users(output)]
            for other in beside:
                if other is not None and other in left:
                    del left[other]
                    group.append(other)
                    waiting.append(other)
        yield group
