"""`inspect`: what is in a file."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from onnxq import bench, graph, plan
from onnxq.graph import Model, Node
from onnxq.types import BlockInfo, InputSpec, Inspection, LayerInfo


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
    quantized = bool({"DequantizeLinear", "QLinearConv", "QLinearMatMul", "QGemm"} & set(operators))
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
    found = []
    for node in graph.nodes(model, *graph.LAYER_OPS):
        info = _layer(node)
        if info is not None:
            found.append(info)
    return found


def _layer(node: Node) -> LayerInfo | None:
    stored = node.inputs[1]
    dequantize = graph.producer(stored, "DequantizeLinear")
    scales = 0
    if dequantize is not None:
        stored = dequantize.inputs[0]
        steps = graph.constant(dequantize.inputs[1])
        scales = int(steps.size) if steps is not None else 0
    array = graph.constant(stored)
    if array is None:
        return None
    dtype, scale, zero = _grid(graph.producer(node.inputs[0], "DequantizeLinear"))
    return LayerInfo(
        name=str(node.name),
        op_type=node.op_type,
        weight_shape=tuple(array.shape),
        weight_dtype=str(array.dtype),
        weight_scales=scales,
        input_dtype=dtype,
        input_scale=scale,
        input_zero_point=zero,
        output_dtype=_output(node),
    )


def _grid(node: Node | None) -> tuple[str, float | None, int | None]:
    if node is None:
        return "float32", None, None
    scale = graph.constant(node.inputs[1])
    zero = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    dtype = str(zero.dtype) if zero is not None else "uint8"
    step = float(scale.reshape(-1)[0]) if scale is not None and scale.size else None
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
