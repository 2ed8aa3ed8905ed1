"""A QDQ model made differentiable: the same nodes, with its roundings taken out and marked.

    x -> [Clip] -> QuantizeLinear -> DequantizeLinear -> y      becomes     x -> Identity -> y
    codes -> DequantizeLinear -> y                              becomes     floats -> y
    LogSoftmax -> QuantizeLinear -> DequantizeLinear -> Exp     becomes     LogSoftmax -> Exp, not marked

Whoever runs the result hangs fake quantizers in at the marked values; with none, it is the float model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxq.graph.edit import add_constant, add_node, move_name, redirect, remove_unused
from onnxq.graph.look import attribute, constant, name_of, nodes, producer


@dataclass(frozen=True)
class Softened:
    """A model without roundings, and where they were.

    Attributes:
        model: The model; its weights are what their codes stand for.
        activations: Quantized tensor -> the value that readers of its grid read.
        weights: Weighted node -> its weight's initializer.
        biases: Weighted node -> its bias's initializer, for those that have one.
    """

    model: ir.Model
    activations: Mapping[str, str]
    weights: Mapping[str, str]
    biases: Mapping[str, str]


def soften(model: ir.Model, tensors: Collection[str]) -> Softened:
    """A differentiable copy of an emitted QDQ model.

    Codes that are not stored as they are read, such as the rows that a Gather takes from a table, stay.

    Args:
        model: What `emit` returned; left as it is.
        tensors: The quantized tensors of its plan.

    Raises:
        ValueError: A rounding belongs to none of `tensors`.
    """
    copy = model.clone()
    tensors_at: dict[str, ir.Value] = {}
    stored: dict[str, ir.Value] = {}
    for node in list(nodes(copy, "DequantizeLinear")):
        source = node.inputs[0]
        rounding = source.producer() if source is not None else None
        logs = producer(rounding.inputs[0], "LogSoftmax") if rounding is not None else None
        if logs is not None:
            redirect(node.outputs[0], logs.outputs[0])
            continue
        if rounding is not None and rounding.op_type == "QuantizeLinear":
            name, tensor = _tensor(node, tensors)
            soft = add_node(copy, "Identity", [tensor], f"{name}_soft", before=node)
            tensors_at[name] = soft
        elif source is not None and (codes := constant(source)) is not None:
            soft = add_constant(copy, f"{source.name}_floats", _floats(node, codes))
            stored[name_of(soft)] = soft
        else:
            continue
        old = node.outputs[0]
        soft.type, soft.shape = ir.TensorType(ir.DataType.FLOAT), old.shape
        redirect(old, soft)
        if old.is_graph_output():
            move_name(old, soft, copy)
    remove_unused(copy)
    activations = {name: name_of(soft) for name, soft in tensors_at.items()}
    return Softened(copy, activations, *_parameters(copy, stored))


def _tensor(restored: ir.Node, tensors: Collection[str]) -> tuple[str, ir.Value]:
    """The quantized tensor behind a DequantizeLinear: its name, and the value before Clip, Sum and rounding.

    A quantized graph output carries the name behind its rounding, see `move_name`.
    """
    output = restored.outputs[0]
    given = name_of(output) if output.is_graph_output() and output.name in tensors else None
    codes = restored.inputs[0]
    rounding = codes.producer() if codes is not None else None
    value = rounding.inputs[0] if rounding is not None else None
    while value is not None:
        if given is not None and name_of(value).startswith(f"{given}_inner"):
            return given, value
        if given is None and value.name in tensors:
            return name_of(value), value
        maker = value.producer()
        value = maker.inputs[0] if maker is not None and maker.op_type in ("Clip", "Sum") else None
    raise ValueError(f"{restored.name} restores no tensor of the plan")


def _floats(node: ir.Node, codes: np.ndarray) -> np.ndarray:
    scale = constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    assert scale is not None
    shape = [1] * codes.ndim
    if scale.ndim:
        shape[attribute(node, "axis", 1)] = -1
    steps = scale.reshape(shape) if scale.ndim else scale
    zeros = 0 if zero is None else (zero.reshape(shape) if zero.ndim else zero)
    floats: np.ndarray = ((codes.astype(np.float64) - zeros) * steps).astype(np.float32)
    return floats


def _parameters(model: ir.Model, stored: Mapping[str, ir.Value]) -> tuple[dict[str, str], dict[str, str]]:
    """Weights and biases among the stored floats, by the node that reads the weight."""
    weights: dict[str, str] = {}
    biases: dict[str, str] = {}
    for node in nodes(model, "Conv", "ConvTranspose", "Gemm", "MatMul"):
        weight = node.inputs[1] if len(node.inputs) > 1 else None
        if weight is None or weight.name not in stored:
            continue
        name = name_of(weight)
        weights[str(node.name)] = name
        bias = node.inputs[2] if len(node.inputs) > 2 else _added(node, stored)
        if bias is not None and bias.name in stored:
            biases[str(node.name)] = name_of(bias)
    return weights, biases


def _added(node: ir.Node, stored: Mapping[str, ir.Value]) -> ir.Value | None:
    """The bias of a MatMul: what the Add behind it adds."""
    readers = [use.node for use in node.outputs[0].uses()]
    if node.op_type != "MatMul" or len(readers) != 1 or readers[0].op_type not in ("Add", "Sum"):
        return None
    return next((value for value in readers[0].inputs if value is not None and value.name in stored), None)
