"""QuantizeLinear and DequantizeLinear of activations, and what stands beside them."""

from __future__ import annotations

import numpy as np

from onnxq import graph
from onnxq.emit.borders import shifted
from onnxq.graph import Model, Node, Value
from onnxq.grid import Grid, quantize
from onnxq.types import Border, TensorGrid

RUNTIME = "com.microsoft"
WITH_CONSTANTS = (
    "Add", "Mul", "Concat", "Sub", "Div", "Min", "Max", "PRelu", "MatMul", "LayerNormalization",
    "InstanceNormalization",
)  # fmt: skip
"""Integer nodes that read constant operands from grids; a bound of a Clip may be the same initializer."""


def grid_constants(model: Model, name: str, grid: TensorGrid) -> tuple[Value, Value]:
    """Scale and zero point of a grid as initializers."""
    scale = graph.add_constant(model, f"{name}_scale", np.asarray(grid.scale, np.float32))
    zero = np.asarray(grid.zero_point, codes_of(grid).dtype)
    return scale, graph.add_constant(model, f"{name}_zero_point", zero)


def codes_of(grid: TensorGrid) -> Grid:
    """The integers of a tensor's grid."""
    return Grid(grid.bits, grid.signed, symmetric=False)


def _rounding_domain(model: Model, grid: TensorGrid) -> str:
    """Where QuantizeLinear takes the grid's codes: 16 bits only in onnxruntime's own domain before opset 21."""
    if grid.bits <= 8 or graph.opset(model) >= 21:
        return ""
    model.opset_imports[RUNTIME] = 1
    return RUNTIME


def emit_constant(model: Model, value: Value, grid: TensorGrid, inside: set[Node]) -> None:
    """A constant operand of integer nodes, stored in codes; float nodes keep the float original."""
    array = graph.constant(value)
    assert array is not None
    name = graph.name_of(value)

    def reads(node: Node) -> bool:
        """The same initializer may also be a bound of a Clip."""
        return node in inside and node.op_type in WITH_CONSTANTS

    first = next((user for user in graph.users(value) if reads(user)), None)
    if first is None:  # in a part of the model for which the plan was made
        return
    codes = quantize(array, grid.scale, grid.zero_point, codes_of(grid))
    scale, zero = grid_constants(model, name, grid)
    stored = graph.add_constant(model, f"{name}_q", codes.astype(codes_of(grid).dtype))
    domain = _rounding_domain(model, grid)
    inputs = [stored, scale, zero]
    restored = graph.add_node(model, "DequantizeLinear", inputs, f"{name}_dq", before=first, domain=domain)
    graph.redirect(value, restored, reads)


def emit_pair(
    model: Model,
    value: Value,
    grid: TensorGrid,
    inside: set[Node],
    guarded: bool = False,
    border: Border | None = None,
    *,
    own: bool = False,
) -> None:
    """Q and DQ behind `value`; who reads the result is the grid's business (`TensorGrid.everywhere`).

    Args:
        model: Edited in place.
        value: The tensor.
        grid: Its grid.
        inside: Integer nodes.
        guarded: Put a one-input Sum in front.
        border: Its rounding border.
        own: One pair for every reader instead of one for all.
    """
    if grid.bits >= 8 and border is None and not guarded:
        widen_clip(model, value, grid)
    readers = [node for node in graph.users(value) if grid.everywhere or node in inside]
    if own:
        for reader in readers:
            restored, _ = _pair(model, value, grid, guarded, border)
            graph.redirect(value, restored, lambda node, only=reader: node is only)  # type: ignore[misc]
        return
    restored, made = _pair(model, value, grid, guarded, border)
    graph.redirect(value, restored, lambda node: node not in made and (grid.everywhere or node in inside))
    if value.is_graph_output() and grid.everywhere:
        graph.move_name(value, restored, model)


def _pair(
    model: Model, value: Value, grid: TensorGrid, guarded: bool, border: Border | None
) -> tuple[Value, list[Node]]:
    """`value` rounded to `grid`, and the nodes that do it, directly behind it."""
    name = graph.name_of(value)
    made: list[Node] = []

    def behind(op_type: str, inputs: list[Value], suffix: str, domain: str = "") -> Value:
        """Append a node to the chain that starts at `value`."""
        last = made[-1] if made else value.producer()
        before = model.graph[0] if last is None else None
        output = graph.add_node(model, op_type, inputs, f"{name}_{suffix}", after=last, before=before, domain=domain)
        node = output.producer()
        assert node is not None
        made.append(node)
        return output

    source = behind("Sum", [value], "guard") if guarded else value
    if border is not None:
        source = shifted(model, name, source, grid, border, behind)
    if grid.bits < 8:
        source = behind("Clip", [source, *_clip_bounds(model, name, grid)], "clip")
    scale, zero = grid_constants(model, name, grid)
    domain = _rounding_domain(model, grid)
    codes = behind("QuantizeLinear", [source, scale, zero], "q", domain)
    return behind("DequantizeLinear", [codes, scale, zero], "dq", domain), made


def _clip_bounds(model: Model, name: str, grid: TensorGrid) -> list[Value]:
    """The ends of a grid of fewer than 8 bits: clipped there, its codes are the only ones that occur."""
    low, high = _ends(grid)
    return [graph.add_constant(model, f"{name}_low", low), graph.add_constant(model, f"{name}_high", high)]


def _ends(grid: TensorGrid) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and the largest value of a grid."""
    codes = codes_of(grid)
    low, high = (np.asarray((code - grid.zero_point) * grid.scale, np.float32) for code in (codes.qmin, codes.qmax))
    return low, high


def widen_clip(model: Model, value: Value, grid: TensorGrid) -> None:
    """Move the bounds of a Clip that makes `value` out to the ends of its grid, where no code changes by that.

    Bounds that round to the first and the last code lie within half a step of these. onnxruntime before 1.31 leaves
    such a Clip out when it fuses, and then refuses its own graph; what begins at or beyond the ends it removes before.

    Args:
        model: Edited in place.
        value: The tensor.
        grid: Its grid.
    """
    clip = graph.producer(value, "Clip")
    bounds = [] if clip is None else [graph.constant(bound) for bound in clip.inputs[1:3]]
    codes, name = codes_of(grid), graph.name_of(value)
    if clip is None or len(bounds) < 2:
        return
    for bound, last in zip(bounds, (codes.qmin, codes.qmax), strict=True):
        if bound is None or bound.dtype != np.float32 or quantize(bound, grid.scale, grid.zero_point, codes) != last:
            return
    low, high = _ends(grid)
    if low < bounds[0]:
        clip.replace_input_with(1, graph.add_constant(model, f"{name}_low", low))
    if high > bounds[1]:
        clip.replace_input_with(2, graph.add_constant(model, f"{name}_high", high))


def guard(model: Model, value: Value) -> None:
    """A one-input Sum between a float value and all its readers."""
    copy = graph.add_node(model, "Sum", [value], f"{graph.name_of(value)}_guard", after=value.producer())
    graph.redirect(value, copy, skip=copy.producer())


def as_sum(model: Model, node: Node) -> None:
    """Write an Add as Sum, which the runtime does not fuse into its slower SkipLayerNormalization."""
    output = graph.add_node(model, "Sum", list(node.inputs), f"{node.name}_sum", before=node)
    old = node.outputs[0]
    output.shape, output.type = old.shape, old.type
    graph.redirect(old, output)
    graph.move_name(old, output, model)
    model.graph.remove(node, safe=True)
