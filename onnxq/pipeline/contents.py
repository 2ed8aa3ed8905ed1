"""`inspect`: what is in a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from onnxq import bench, graph, plan
from onnxq.emit import products, weight_grid
from onnxq.graph import Model, Node, Value
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Array, BlockInfo, InputSpec, Inspection, LayerInfo

_LOOK = SessionConfig(optimize="off")
_QUANTIZED = {
    "DequantizeLinear", "QLinearConv", "QLinearMatMul", "QGemm", "MatMulIntegerToFloat", "DynamicQuantizeLinear",
    "MatMulInteger", "ConvInteger",
}  # fmt: skip
_NARROW = ("int4", "uint4", "int2", "uint2")
"""Element types of less than a byte."""


def inspect(path: str | Path, *, blocks: bool = False) -> Inspection:
    """Look into an ONNX file, float or quantized.

    Args:
        path: The file.
        blocks: Also find blocks and stages. A quantized file has none: they are found in the float model.

    Raises:
        ModelError: The file cannot be read or is not a valid model.
    """
    source = graph.require_readable(path)
    model = graph.load(source)
    operators = Counter(node.op_type for node in graph.nodes(model))
    quantized = not _QUANTIZED.isdisjoint(operators)
    weights: Counter[str] = Counter()
    for value in model.graph.initializers.values():
        if value.const_value is not None:
            weights[graph.dtype_name(value) or "?"] += value.const_value.nbytes
    return Inspection(
        path=source.name,
        bytes=graph.disk_bytes(source),
        opset=graph.opset(model),
        ir_version=model.ir_version,
        inputs=tuple(InputSpec(*spec) for spec in graph.input_specs(model)),
        outputs=tuple(graph.name_of(value) for value in model.graph.outputs),
        operators=dict(operators.most_common()),
        weight_bytes=dict(weights.most_common()),
        layers=tuple(_layers(model)),
        coverage=bench.foreign_coverage(source) if quantized else None,
        provenance={key: text for key, text in model.metadata_props.items() if key.startswith("onnxq.")},
        blocks=(() if quantized else _blocks(model)) if blocks else None,
    )


def _blocks(model: Model) -> tuple[BlockInfo, ...]:
    graph.infer_shapes(model)
    return tuple(
        BlockInfo(block.name, block.stage, block.inputs, block.outputs, len(block.nodes), block.layers)
        for block in plan.find_blocks(model)
    )


def _layers(model: Model) -> list[LayerInfo]:
    stored = {node: _stored(node) for node in (*graph.nodes(model, *graph.LAYER_OPS), *products(model))}
    names = [graph.name_of(value) for value in stored.values() if value is not None and not value.is_initializer()]
    unpacked = Session(graph.sub_model(model, [], names), _LOOK).run({}) if names else {}
    found = []
    for node, value in stored.items():
        if value is not None:
            array = graph.constant(value)
            found.append(_layer(node, value, unpacked[graph.name_of(value)] if array is None else array))
    return found


def _stored(node: Node) -> Value | None:
    """A layer's weight before its DequantizeLinear, an initializer or what nodes unpack; None for any other operand."""
    weight, dequantize = node.inputs[1], graph.producer(node.inputs[1], "DequantizeLinear")
    if dequantize is None and node.op_type not in graph.LAYER_OPS:
        return weight if graph.sources(weight) else None
    if dequantize is None:
        return weight if graph.constant(weight) is not None else None
    weight = dequantize.inputs[0]
    return weight if graph.sources(weight) else None


def _layer(node: Node, stored: Value, array: Array) -> LayerInfo:
    grid = weight_grid(node)
    steps = graph.constant(grid[0]) if grid else None
    held = graph.sources(stored) or []
    narrow = [name for name in map(graph.dtype_name, held) if name in _NARROW]
    packed = not stored.is_initializer()
    own = [value for value in held if not packed or len(graph.users(value)) == 1]
    own += grid
    codes = None if array.dtype.kind == "f" else _codes(array)
    book = _book(stored)
    dtype, scale, zero = _grid(_input_grid(node))
    return LayerInfo(
        name=str(node.name),
        op_type=node.op_type,
        weight_shape=tuple(array.shape),
        weight_dtype=(narrow or ["uint8"])[0] if packed else str(array.dtype),
        weight_bits=_width(book) if book else 8 * array.itemsize if codes is None else _bits(array, node),
        weight_bytes=sum(value.const_value.nbytes for value in own if value.const_value is not None),
        packed=packed,
        codebook=book,
        codes=codes,
        weight_scales=int(steps.size) if steps is not None else 0,
        input_dtype=dtype,
        input_scale=scale,
        input_zero_point=zero,
        output_dtype=_output(node),
    )


def _codes(array: Array) -> dict[int, int]:
    """How often each code occurs, the lowest first."""
    codes, counts = np.unique(array.astype(np.int32), return_counts=True)
    return dict(zip(codes.tolist(), counts.tolist(), strict=True))


def _book(stored: Value) -> int:
    """Entries of the codebooks that a weight is looked up in; 0 where it is not."""
    found = graph.producer(stored, "GatherElements", "Gather") or graph.producer(stored, "Reshape")
    if found is not None and found.op_type == "Reshape":
        found = graph.producer(found.inputs[0], "GatherElements")
    table = graph.constant(found.inputs[0]) if found is not None else None
    if found is None or table is None or (found.op_type == "Gather" and table.ndim != 1):
        return 0
    return int(table.shape[found.attributes.get_int("axis", 0)])


def _width(count: int) -> int:
    """Bits of an index of `count` values."""
    return max((count - 1).bit_length(), 1)


def _bits(codes: Array, node: Node) -> int:
    """The width of the narrowest integers that hold the codes of every channel, wherever they begin."""
    dequantize, grid = graph.producer(node.inputs[1], "DequantizeLinear"), weight_grid(node)
    axis = dequantize.attributes.get_int("axis", 1) if dequantize is not None else 1
    steps = graph.constant(grid[0]) if grid else None
    rows = codes.reshape(1, -1) if steps is None or steps.ndim == 0 else np.moveaxis(codes, axis, 0)
    rows = rows.reshape(len(rows), -1).astype(np.int32)
    spread = int((rows.max(axis=1) - rows.min(axis=1)).max()) if rows.size else 0
    return max(spread.bit_length(), 1)


def _input_grid(node: Node) -> list[Value | None]:
    """Step and, where it is written, zero point of what a layer reads; nothing where that is float."""
    if node.op_type not in graph.LAYER_OPS:
        return [*node.inputs[2:3], *node.inputs[4:5]]
    restored = graph.producer(node.inputs[0], "DequantizeLinear")
    return [] if restored is None else list(restored.inputs[1:])


def _grid(held: Sequence[Value | None]) -> tuple[str, float | None, int | None]:
    if not held:
        return "float32", None, None
    scale = graph.constant(held[0])
    zero = graph.constant(held[1]) if len(held) > 1 else None
    dtype = str(zero.dtype) if zero is not None else "uint8"
    step = float(scale.reshape(-1)[0]) if scale is not None and scale.size else None
    if zero is None and len(held) > 1 and held[1] is not None:
        return dtype, step, None  # found in every run
    return dtype, step, int(zero.reshape(-1)[0]) if zero is not None and zero.size else 0


def _output(node: Node) -> str:
    """Element type of what the layer hands on: its QuantizeLinear, behind a bias Add and an activation."""
    value = node.outputs[0]
    for _ in range(3):
        user = graph.only_user(value)
        if user is None:
            return "float32"
        if user.op_type == "QuantizeLinear":
            zero = graph.constant(user.inputs[2]) if len(user.inputs) > 2 else None
            return str(zero.dtype) if zero is not None else "uint8"
        if user.op_type not in ("Add", "Relu", "Clip"):
            return "float32"
        value = user.outputs[0]
    return "float32"
