"""What the runtime must be kept from fusing, because it would get it wrong or make it slow.

Observed with onnxruntime 1.31 on CPU (each case has a test in tests/emit); both remedies survive its optimiser:

* A one-input Sum behind a tensor (`guards`).
* A Sum instead of an Add (`sums`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from onnxq import graph
from onnxq.graph import Node, Value
from onnxq.plan.units import MOVES, Unit, makers, odd_pool

CLIPS = ("Relu", "Clip")
THROUGH = MOVES | {*CLIPS}
"""Operators past which the runtime looks for a DequantizeLinear in front and a QuantizeLinear behind."""


def guards(
    units: Sequence[Unit], integer: frozenset[Unit], tensors: frozenset[str], fixed: frozenset[str]
) -> tuple[str, ...]:
    """Names of tensors behind which a one-input Sum has to stand.

    Behind a tensor of `tensors`, it stands in front of the QuantizeLinear alone. Three things are prevented:

    * Float nodes between a DequantizeLinear and a QuantizeLinear, moving nodes in between or not, are quantized
      unasked: layers get int8 weights with a single scale, Softmax its slow integer kernel with a fixed [0, 1] range,
      some pooling a kernel that is wrong.
    * An integer Gemm or MatMul that is read by a QuantizeLinear as well as in float is not fused.
    * Neither is one in front of a Relu or Clip that has a single reader, unless the Relu or Clip is absorbed.

    Args:
        units: All units.
        integer: Those that run in integers.
        tensors: Tensors on a grid.
        fixed: Those of them that float nodes read from the grid, too.
    """
    maker = makers(list(units))
    found: set[str] = set()
    for unit in units:
        if unit in integer:
            found.update(_exposed(unit, integer, tensors, fixed) if unit.linear else ())
        elif _tempting(unit.node) and unit.inputs and _from_grid(unit.inputs[0], maker, fixed):
            found.update(_to_grid(_result(unit), tensors))
    return tuple(sorted(found))


def _result(unit: Unit) -> Value:
    """What a unit computes before any activation."""
    return unit.layer.output if unit.layer is not None else unit.output


def _exposed(unit: Unit, integer: frozenset[Unit], tensors: frozenset[str], fixed: frozenset[str]) -> Iterator[str]:
    """Where a Sum lets the runtime fuse an integer Gemm or MatMul."""
    result = _result(unit)
    if unit.output is not result:  # an activation is absorbed, if there is a grid to absorb it into
        lost = unit.output.name not in tensors and graph.only_user(unit.output) is not None
        if lost and not _ends_on_grid(unit.output, integer, tensors):
            yield graph.name_of(result)
        return
    readers = graph.users(result)
    clips = [reader for reader in readers if reader.op_type in CLIPS]
    if result.name in tensors and result.name not in fixed:
        yield graph.name_of(result)
    if result.name not in tensors and len(readers) == len(clips) == 1:
        yield graph.name_of(result)
    else:  # a Relu in front of a QuantizeLinear vanishes, and leaves that as one of several readers
        for clip in clips:
            yield from _to_grid(clip.outputs[0], tensors)


def _ends_on_grid(value: Value, integer: frozenset[Unit], tensors: frozenset[str]) -> bool:
    """Whether `value` is only moved, and then read in integers alone: the runtime moves the QuantizeLinear forward."""
    while value.name not in tensors:
        reader = graph.only_user(value)
        if reader is None or reader.op_type not in MOVES or len(reader.outputs) != 1:
            return False
        value = reader.outputs[0]
    inside = {unit.node for unit in integer}
    return not value.is_graph_output() and all(reader in inside for reader in graph.users(value))


def _tempting(node: Node) -> bool:
    """Whether the runtime quantizes `node` unasked."""
    if node.op_type in graph.LAYER_OPS:
        return len(node.inputs) > 1 and graph.constant(node.inputs[1]) is not None
    return node.op_type == "Softmax" or odd_pool(node) != ""


def _from_grid(value: Value, maker: Mapping[Value, Unit], fixed: frozenset[str]) -> bool:
    """Whether a float node that reads `value` reads it from a grid, moved or not."""
    while value.name not in fixed:
        unit = maker.get(value)
        if unit is None or unit.node.op_type not in THROUGH or not unit.inputs:
            return False
        value = unit.inputs[0]
    return True


def _to_grid(value: Value, tensors: frozenset[str]) -> Iterator[str]:
    """Quantized tensors that hold the values of the float `value`, moved or not."""
    if value.name in tensors:
        yield graph.name_of(value)
    for node in graph.users(value):
        if node.op_type in THROUGH and node.inputs[0] is value:
            for output in node.outputs:
                yield from _to_grid(output, tensors)


def sums(units: Sequence[Unit], integer: frozenset[Unit]) -> tuple[str, ...]:
    """Float Add nodes to be written as Sum.

    The runtime fuses a residual addition and the normalisation behind it into a SkipLayerNormalization that is slower
    than the two; and a MatMul without a bias and any addition into a Gemm for which it has no integer kernel.
    """
    maker = makers(list(units))
    found: list[str] = []
    for unit in units:
        if unit in integer or unit.node.op_type != "Add":
            continue
        if any(graph.dtype_name(value) not in (None, "float32") for value in (*unit.inputs, unit.output)):
            continue
        residual = not unit.constants and len(unit.members) == 1
        normalised = residual and any(_normalises(user) for user in graph.users(unit.output))
        if normalised or any(_bare_product(maker.get(value), integer) for value in unit.inputs):
            found.append(unit.name)
    return tuple(found)


def _bare_product(unit: Unit | None, integer: frozenset[Unit]) -> bool:
    """Whether a unit is an integer MatMul without a bias whose result has a single reader."""
    if unit is None or unit not in integer or not unit.linear:
        return False
    if unit.layer is not None and unit.layer.bias is not None:
        return False
    return unit.node.op_type == "MatMul" and graph.only_user(unit.node.outputs[0]) is not None


def _normalises(node: Node) -> bool:
    if node.op_type in ("LayerNormalization", "SimplifiedLayerNormalization", "RMSNormalization"):
        return True
    return node.op_type == "ReduceMean"  # the first node of a decomposed LayerNormalization
