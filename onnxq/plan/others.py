"""Which tensors get grids for targets that do not compute with onnxruntime's CPU kernels.

`operands`, for runtimes that fuse by themselves: the inputs of layers, each for the layers alone, and of an addition
behind a convolution the other operand: then both the convolution and the addition read integers, and the addition, its
activation and the next QuantizeLinear belong to the convolution's kernel. Nothing stands between a convolution and what
follows it.

`everything`, for processors without fast floats: every node whose operands and results are floats reads grids and
returns grids. Left out is what a grid would break: masks, which are computed from integers, and sums with them up to
Softmax, for a mask of -10000 leaves no step for the scores, and one that calibration never saw would be cut off.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from onnxq import graph
from onnxq.graph import Node, Value
from onnxq.plan.attention import BETWEEN
from onnxq.plan.units import SHAPES, Unit

LAYERS = ("Conv", "Gemm", "MatMul")
KEPT = "asked to stay in float"
FUSED = "the runtime fuses it with a layer, or computes it in float"
OPERATORS = {
    "Sub", "Div", "Min", "Max", "Pow", "PRelu", "Softmax", "LogSoftmax", "LayerNormalization", "InstanceNormalization",
    "Gelu", "Tanh", "HardSwish", "HardSigmoid", "Elu", "Exp", "Log", "Sqrt", "Abs", "Neg", "Erf", "Softplus",
    "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "GlobalMaxPool", "AveragePool", "Resize", "Pad", "MatMul",
}  # fmt: skip
"""Operators that an NPU computes on grids, beyond those of the CPU's kernels."""
CONSTANTS = {
    "Add": (0, 1), "Mul": (0, 1), "Sub": (0, 1), "Div": (0, 1), "Min": (0, 1), "Max": (0, 1), "PRelu": (1,),
    "MatMul": (0, 1), "LayerNormalization": (1,), "InstanceNormalization": (1,),
}  # fmt: skip
"""Operands that may be constants, and then have a grid, too."""
LARGEST = 1e5
"""A constant operand beyond this is a mask's."""


@dataclass(frozen=True)
class Chosen:
    """What runs in integers, and which tensors get a grid; the attributes are those of `Placement`."""

    units: tuple[Unit, ...]
    integer: frozenset[Unit]
    tensors: tuple[str, ...]
    fixed: frozenset[str]
    skipped: dict[str, str]


def operands(units: list[Unit], keep: set[str], refuse: Mapping[str, str]) -> Chosen:
    """Grids in front of layers and beside residual additions; arguments as in `place`, by names."""
    skipped: dict[str, str] = {}
    depth = _depths(units)
    found: list[Unit] = []
    for unit in units:
        reason = _kept(unit, keep) or next((refuse[name] for name in names(unit.inputs) if name in refuse), "")
        if unit.kind == "product":
            taken: Unit | str = unit
        elif unit.layer is not None and unit.node.op_type in LAYERS:
            taken = replace(unit, kind="layer", reason="")
        else:
            taken = _residual(unit, depth, refuse)
        if isinstance(taken, Unit) and not reason:
            unit = taken
        else:
            skipped[unit.name] = reason or (taken if isinstance(taken, str) else "")
        found.append(unit)
    integer = frozenset(unit for unit in found if unit.name not in skipped)
    tensors = dict.fromkeys(graph.name_of(value) for unit in found if unit in integer for value in unit.inputs)
    return Chosen(tuple(found), integer, tuple(tensors), frozenset(), skipped)


def _residual(unit: Unit, depth: Mapping[Value, int], refuse: Mapping[str, str]) -> Unit | str:
    """An addition behind a convolution with its other operand as the only one on a grid, or why it is none."""
    if unit.node.op_type != "Add" or len(unit.inputs) != 2:
        return unit.reason if unit.reason in (SHAPES, graph.PRODUCT) else FUSED
    fused = [value for value in unit.inputs if _convolved(value)]
    if not fused:
        return "no operand is the result of a convolution alone"
    deepest = max(fused, key=lambda value: depth.get(value, 0))
    other = next(value for value in unit.inputs if value is not deepest)
    if graph.name_of(other) in refuse:
        return refuse[graph.name_of(other)]
    return replace(unit, kind="elementwise", inputs=(other,), constants=(), reason="")


def _convolved(value: Value) -> bool:
    """Whether a value is the result of a convolution with constant weights, and read by nothing else."""
    node = graph.producer(value, "Conv")
    return node is not None and not isinstance(graph.layer_of(node), str) and graph.only_user(value) is not None


def _depths(units: list[Unit]) -> dict[Value, int]:
    """Layers on the longest way to each value."""
    depth: dict[Value, int] = {}
    for unit in units:
        below = max((depth.get(value, 0) for member in unit.members for value in member.inputs if value), default=0)
        for member in unit.members:
            depth.update((value, below + (unit.layer is not None)) for value in member.outputs)
    return depth


def everything(units: list[Unit], keep: set[str], refuse: Mapping[str, str]) -> Chosen:
    """Grids on all that is computed in float; arguments as in `place`, by names."""
    skipped: dict[str, str] = {}
    found: list[Unit] = []
    masks: set[Value] = set()
    masked: set[Value] = set()
    for unit in units:
        whole = _whole(unit)
        reason = _kept(unit, keep) or (whole if isinstance(whole, str) else "")
        if not reason and isinstance(whole, Unit):
            unit = whole
            reason = _masking(unit, masks, masked) or _unusable(unit, refuse)
        elif unit.inputs and unit.node.op_type != "Gather" and all(_is_mask(value, masks) for value in unit.inputs):
            masks.update(unit.outputs)
        if reason:
            skipped[unit.name] = reason
        found.append(unit)
    integer = frozenset(unit for unit in found if unit.name not in skipped)
    tensors = dict.fromkeys(
        graph.name_of(value)
        for unit in found
        if unit in integer
        for value in (*unit.inputs, *unit.outputs)
        if value.name
    )
    made = {str(value.name) for unit in integer for value in unit.outputs}
    return Chosen(tuple(found), integer, tuple(tensors), frozenset(made.intersection(tensors)), skipped)


def _whole(unit: Unit) -> Unit | str:
    """The unit with all its float operands, or why the target does not compute it in integers."""
    node = unit.node
    if node.domain not in ("", "ai.onnx"):
        return unit.reason
    if unit.layer is not None and (node.op_type != "ConvTranspose" or graph.attribute(node, "group", 1) == 1):
        return replace(unit, kind="layer", reason="")
    if unit.kind == "float" and (node.op_type not in OPERATORS or unit.reason == SHAPES):
        return unit.reason
    values = [value for value in node.inputs if value is not None]
    inputs = tuple(dict.fromkeys(value for value in _floats(node) if graph.constant(value) is None))
    if not inputs or any(graph.dtype_name(value) not in (None, "float32") for value in (*_floats(node), *unit.outputs)):
        return SHAPES
    places = CONSTANTS.get(node.op_type, tuple(range(len(values))) if node.op_type == "Concat" else ())
    constants = tuple(
        value
        for at, value in enumerate(node.inputs)
        if at in places and value is not None and graph.constant(value) is not None
    )
    kind = unit.kind if unit.kind in ("elementwise", "concat", "move") else "own"
    return replace(unit, kind=kind, inputs=inputs, constants=constants, reason="")


def _floats(node: Node) -> Iterator[Value]:
    """Operands that hold activations or factors, not sizes, bounds or indices."""
    count = {"Resize": 1, "Pad": 1, "Clip": 1, "ReduceSum": 1, "ReduceMean": 1, "ReduceMax": 1, "ReduceMin": 1}
    few = {"Reshape", "Expand", "Tile", "Slice", "Gather", "Split", "Squeeze", "Unsqueeze"}
    last = count.get(node.op_type, 1 if node.op_type in few else len(node.inputs))
    yield from (value for value in node.inputs[:last] if value is not None)


def _is_mask(value: Value, masks: set[Value]) -> bool:
    """Whether a value is no float, or computed from integers alone."""
    return value in masks or graph.dtype_name(value) not in (None, "float32")


def _masking(unit: Unit, masks: set[Value], masked: set[Value]) -> str:
    """Why a unit must stay in float because of a mask, "" where it need not; `masks` and `masked` grow."""
    if all(value in masks for value in unit.inputs):
        masks.update(unit.outputs)
        return SHAPES
    if unit.node.op_type not in BETWEEN | {"Softmax", "LogSoftmax"}:
        return ""
    sees = any(value in masks or value in masked for value in unit.inputs)
    if not sees:
        return ""
    if unit.node.op_type in BETWEEN:
        masked.update(unit.outputs)
    return "its operand is masked"


def _unusable(unit: Unit, refuse: Mapping[str, str]) -> str:
    for name in names((*unit.inputs, *unit.outputs)):
        if name in refuse:
            return refuse[name]
    for value in unit.constants:
        array = graph.constant(value)
        if array is not None and array.size and not abs(array).max() <= LARGEST:
            return f"its constant operand {value.name} is out of proportion"
    return ""


def names(values: Iterable[Value]) -> list[str]:
    """Names of values; what has none is left out."""
    return [value.name for value in values if value.name]


def _kept(unit: Unit, keep: set[str]) -> str:
    return KEPT if any(member.name in keep for member in unit.members) else ""
