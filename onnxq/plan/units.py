"""Units: the pieces of a graph that a target runs as one integer kernel.

A unit is a node together with what its kernel absorbs: the Add that holds a MatMul's bias, and a Relu or Clip behind
it. SiLU, x * Sigmoid(x), may be one unit of two nodes, between two grids but without one inside. Every node of the main
graph belongs to exactly one unit. A unit says what its kernel would need; whether it gets it is decided in `placement`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxq import graph
from onnxq.graph import Layer, Model, Node, Value

Kind = Literal["layer", "product", "elementwise", "concat", "own", "move", "float"]
"""How a unit's grids relate to each other.

layer: weights; its input grid is free, its output grid is free. product: two computed operands of attention, likewise
(`attention` makes these units). elementwise, own, concat: free grids on both sides
(concat is cheaper when they are equal). move: values pass unchanged, one grid for all of them. float: no kernel.
"""

MOVES = {
    "MaxPool", "Transpose", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Slice", "Gather", "Expand", "Tile",
    "DepthToSpace", "Split",
}  # fmt: skip
OWN = {"GlobalAveragePool", "AveragePool", "LeakyRelu", "Sigmoid", "Relu", "Clip"}
REASONS = {
    "ReduceMean": "the runtime has no integer kernel for ReduceMean",
    "GlobalMaxPool": "the runtime has no integer kernel for GlobalMaxPool",
    "Softmax": "int8 softmax is 4 to 5 times slower than float in this runtime",
    "LayerNormalization": "the runtime normalises in float",
    "ConvTranspose": "the runtime has no integer kernel for ConvTranspose",
    "If": "its branches are left as they are",
    "Loop": "its body is left as it is",
    "Scan": "its body is left as it is",
}
NOT_NUMERIC = {
    "Shape", "Size", "ConstantOfShape", "Range", "NonZero", "Cast", "Equal", "Not", "And", "Or", "Xor", "Greater",
    "GreaterOrEqual", "Less", "LessOrEqual", "Where", "Identity",
}  # fmt: skip
SHAPES = "it works on shapes or masks"


@dataclass(frozen=True, eq=False)
class Unit:
    """One node and what its kernel absorbs.

    Attributes:
        node: The node that gives the unit its name.
        kind: How its grids relate.
        members: All its nodes, `node` first.
        inputs: Activations its integer kernel would read.
        constants: Constant operands its integer kernel would read in integers.
        outputs: What it returns.
        layer: Weights and bias, for a layer.
        low: Lower bound of an absorbed activation.
        high: Upper bound of an absorbed activation.
        reason: Why it has no integer kernel; empty for candidates.
    """

    node: Node
    kind: Kind
    members: tuple[Node, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    constants: tuple[Value, ...] = ()
    layer: Layer | None = None
    low: float = -np.inf
    high: float = np.inf
    reason: str = ""

    @property
    def name(self) -> str:
        """Name of its node."""
        return str(self.node.name)

    @property
    def output(self) -> Value:
        """Its first output."""
        return self.outputs[0]

    @property
    def linear(self) -> bool:
        """A Gemm or MatMul: its kernel can return float as well as integers."""
        return self.kind == "product" or (self.layer is not None and self.layer.node.op_type in ("Gemm", "MatMul"))


def units_of(model: Model, absorb: bool = True, silu: bool = False, apart: Collection[str] = ()) -> list[Unit]:
    """All units in graph order.

    Args:
        model: The prepared float model.
        absorb: Whether a MatMul's unit holds the Add of its bias; otherwise that is a unit of its own.
        silu: Whether the Mul of a SiLU has the Sigmoid in its unit; otherwise that is a unit of its own.
        apart: Names of nodes of which that is not true.
    """
    found: list[Unit] = []
    absorbed: set[Node] = set()
    for node in graph.nodes(model):
        if node in absorbed:
            continue
        unit = (_silu(node, apart) if silu else None) or _unit(node, absorb)
        absorbed.update(unit.members)
        found.append(unit)
    return found


def _unit(node: Node, absorb: bool) -> Unit:
    if node.domain not in ("", "ai.onnx"):
        return _float(node, f"{node.domain}.{node.op_type} is not a standard operator")
    if node.op_type in ("Conv", "Gemm", "MatMul"):
        return _layer(node, absorb)
    if node.op_type in ("Add", "Mul"):
        return _operands(node, "elementwise", absorb=True)
    if node.op_type == "Concat":
        return _operands(node, "concat", absorb=False)
    if node.op_type in OWN:
        value = node.inputs[0]
        assert value is not None
        reason = odd_pool(node)
        if reason:
            return _float(node, reason)
        low, high = _bounds(node)
        return Unit(node, "own", (node,), (value,), tuple(node.outputs), low=low, high=high)
    if node.op_type in MOVES or _nearest(node):
        return _move(node)
    if node.op_type in NOT_NUMERIC:
        return _float(node, SHAPES)
    return _float(node, REASONS.get(node.op_type, f"the runtime has no integer kernel for {node.op_type}"))


def _silu(node: Node, apart: Collection[str]) -> Unit | None:
    """The SiLU that a Sigmoid belongs to, with its Mul as the head, unless one of them is to be `apart`."""
    product = graph.only_user(node.outputs[0]) if node.op_type == "Sigmoid" else None
    if product is None or graph.silu_gate(product) is not node or {node.name, product.name} & set(apart):
        return None
    value = node.inputs[0]
    assert value is not None
    return Unit(product, "own", (product, node), (value,), tuple(product.outputs))


def _float(node: Node, reason: str) -> Unit:
    return Unit(
        node,
        "float",
        (node,),
        tuple(value for value in node.inputs if value is not None and graph.constant(value) is None),
        tuple(node.outputs),
        layer=_weights_only(node),
        reason=reason,
    )


def _weights_only(node: Node) -> Layer | None:
    layer = graph.layer_of(node)
    return None if isinstance(layer, str) else layer


def _layer(node: Node, absorb: bool) -> Unit:
    layer = graph.layer_of(node)
    if isinstance(layer, str):
        return _float(node, layer)
    if layer.bias_add is not None and not absorb:
        return Unit(node, "layer", (node,), (layer.data,), (node.outputs[0],), layer=layer)
    members = [node, *([layer.bias_add] if layer.bias_add is not None else [])]
    reason = _slow_group(node, layer)
    activation = graph.activation_after(layer.output)
    output, low, high = layer.output, -np.inf, np.inf
    if activation is not None:
        members.append(activation.node)
        output, low, high = activation.node.outputs[0], activation.low, activation.high
    if reason:
        return Unit(node, "float", tuple(members), (layer.data,), (output,), layer=layer, reason=reason)
    return Unit(node, "layer", tuple(members), (layer.data,), (output,), layer=layer, low=low, high=high)


def _slow_group(node: Node, layer: Layer) -> str:
    """Grouped convolutions with few channels per group: measured 0.08x to 0.6x of float in int8.

    `MergeGroups` has widened those that it can. Depthwise convolutions have a kernel of their own.
    """
    groups = graph.attribute(node, "group", 1)
    if node.op_type != "Conv" or groups < 8 or groups == layer.channels:
        return ""
    per_group = layer.weight.shape[1]
    return f"{groups} groups of {per_group} channels are slower in int8 than in float" if per_group < 32 else ""


def is_depthwise(layer: Layer) -> bool:
    """A convolution with several groups of one input channel."""
    return layer.node.op_type == "Conv" and layer.weight.shape[1] == 1 and graph.attribute(layer.node, "group", 1) > 1


def _operands(node: Node, kind: Kind, *, absorb: bool) -> Unit:
    values = [value for value in node.inputs if value is not None]
    constants = tuple(value for value in values if graph.constant(value) is not None)
    for value in constants:
        array = graph.constant(value)
        assert array is not None
        if array.dtype != np.float32:
            return _float(node, SHAPES if array.dtype.kind in "iub" else f"it works on {array.dtype} values")
        if not array.size or not np.isfinite(array).all():
            return _float(node, f"its constant operand {value.name} holds infinities or NaN")
    members, output, low, high = [node], node.outputs[0], -np.inf, np.inf
    activation = graph.activation_after(output) if absorb and node.op_type == "Add" else None
    if activation is not None:
        members.append(activation.node)
        output, low, high = activation.node.outputs[0], activation.low, activation.high
    inputs = tuple(value for value in values if value not in constants)
    return Unit(node, kind, tuple(members), inputs, (output,), constants, low=low, high=high)


def odd_pool(node: Node) -> str:
    """Pooling that the runtime's integer kernel refuses or gets wrong (measured with onnxruntime 1.31)."""
    if node.op_type != "AveragePool":
        return ""
    if any(step != 1 for step in graph.attribute(node, "dilations", list[int]())):
        return "the runtime's integer AveragePool knows no dilations"
    if graph.attribute(node, "ceil_mode", 0) and graph.attribute(node, "count_include_pad", 0):
        return "the runtime's integer AveragePool counts what ceil_mode adds"
    return ""


def _bounds(node: Node) -> tuple[float, float]:
    """The interval that holds everything a node returns, and 0."""
    if node.op_type in ("Relu", "Sigmoid"):
        return 0.0, np.inf
    if node.op_type != "Clip":
        return -np.inf, np.inf
    low, high = (graph.constant(value) for value in (*node.inputs[1:], None, None)[:2])
    return (
        min(float(low.reshape(-1)[0]), 0.0) if low is not None and low.size else -np.inf,
        max(float(high.reshape(-1)[0]), 0.0) if high is not None and high.size else np.inf,
    )


def _nearest(node: Node) -> bool:
    """A Resize that only copies; cropping ones also fill in a value."""
    if node.op_type != "Resize" or graph.attribute(node, "mode", "nearest") != "nearest":
        return False
    return graph.attribute(node, "coordinate_transformation_mode", "half_pixel") != "tf_crop_and_resize"


def _move(node: Node) -> Unit:
    value = node.inputs[0]
    if value is None or graph.constant(value) is not None:
        return _float(node, "it reads a constant")
    if node.op_type == "MaxPool" and len(node.outputs) > 1 and node.outputs[1].name:
        return _float(node, "it also returns indices")
    return Unit(node, "move", (node,), (value,), tuple(node.outputs))


def makers(units: list[Unit]) -> dict[Value, Unit]:
    """The unit that returns each value."""
    return {output: unit for unit in units for output in unit.outputs}


def readers(units: list[Unit]) -> dict[Value, list[Unit]]:
    """The units that read each value, subgraph captures not included."""
    found: dict[Value, list[Unit]] = {}
    for unit in units:
        for value in _reads(unit):
            found.setdefault(value, []).append(unit)
    return found


def _reads(unit: Unit) -> Iterator[Value]:
    inside = {output for member in unit.members for output in member.outputs}
    seen: set[Value] = set()
    for member in unit.members:
        for value in member.inputs:
            if value is not None and value not in inside and value not in seen:
                seen.add(value)
                yield value
