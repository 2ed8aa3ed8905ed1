"""Weights apart from their graph: a large model changes hands without a copy of its weights.

A protobuf message holds a copy of every weight, its bytes a second one, and whoever parses these a third. Here a graph
is written with a mark in the place of each large weight, and the weights go along as the arrays that they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

WHOLE = 16 * 2**20
"""Models with fewer bytes of weights are not taken apart: a copy costs less."""
LEAST = 2**16
"""Bytes of a weight that is taken out; shapes, bounds and scales stay where shape inference sees them."""
_PLAIN = frozenset(
    int(kind)
    for kind in (
        ir.DataType.FLOAT,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT16,
        ir.DataType.INT8,
        ir.DataType.UINT8,
        ir.DataType.INT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
    )
)
"""Element types that numpy and every runtime have."""
_ELSEWHERE = "taken-out"
Arrays = dict[str, npt.NDArray[Any]]
"""Weights by name."""


def large_weights(model: ir.Model, least: int = LEAST) -> dict[str, ir.TensorProtocol]:
    """The initializers of the main graph with `least` bytes or more, of element types that numpy has."""
    found = {name: value.const_value for name, value in model.graph.initializers.items()}
    return {
        name: tensor
        for name, tensor in found.items()
        if tensor is not None and tensor.nbytes >= least and int(tensor.dtype) in _PLAIN
    }


def to_parts(model: ir.Model) -> tuple[bytes, Arrays]:
    """`model` as a message with marks for its large weights, and these weights by name, not copied where possible."""
    proto, taken = _without(model)
    arrays = {name: _aligned(tensor.numpy()) for name, tensor in taken.items()}
    data: bytes = proto.SerializeToString(deterministic=True)
    return data, arrays


def bare(model: ir.Model) -> onnx.ModelProto:
    """The message of `model` without initializers."""
    proto, _ = _without(model)
    del proto.graph.initializer[:]
    return proto


def _without(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.TensorProtocol]]:
    taken = large_weights(model)
    copy = model.clone()
    for name, tensor in taken.items():
        copy.graph.initializers[name].const_value = ir.ExternalTensor(
            _ELSEWHERE, 0, tensor.nbytes, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    return ir.to_proto(copy), taken


def _aligned(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """`array`, or a copy where its elements do not lie one after the other at their natural places."""
    return np.require(array, requirements=["C", "A"])


def lift_weights(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, Arrays]:
    """A message without the bytes of its large weights, and these weights as arrays.

    Reading a weight of a message copies it, every time; and a message keeps all of its memory as long as any part of
    it is in use.

    Args:
        proto: Emptied; not to be used any more.
    """
    arrays: Arrays = {}
    for tensor in proto.graph.initializer:
        if tensor.data_type in _PLAIN and tensor.HasField("raw_data") and len(tensor.raw_data) >= LEAST:
            dtype = np.dtype(ir.DataType(tensor.data_type).numpy()).newbyteorder("<")
            arrays[tensor.name] = np.frombuffer(tensor.raw_data, dtype).reshape(tuple(tensor.dims))
            tensor.ClearField("raw_data")
    lean = onnx.ModelProto()
    lean.CopyFrom(proto)
    return lean, arrays


def put_back(model: ir.Model, arrays: Arrays) -> None:
    """Give the initializers of these names their arrays."""
    for name, array in arrays.items():
        model.graph.initializers[name].const_value = ir.Tensor(array, name=name)


def weights_as_inputs(model: ir.Model, least: int) -> ir.Model:
    """A copy in which initializers of `least` bytes or more are inputs of the same names, types and shapes."""
    copy = model.clone()
    for name in large_weights(copy, least):
        value = copy.graph.initializers.pop(name)
        value.const_value = None
        copy.graph.inputs.append(value)
    return copy


def inputs_as_weights(model: ir.Model, source: ir.Model, least: int) -> None:
    """Undo `weights_as_inputs` in what was made of its result; the weights are shared with `source`."""
    for name, tensor in large_weights(source, least).items():
        value = next((entry for entry in model.graph.inputs if entry.name == name), None)
        if value is not None:
            model.graph.inputs.remove(value)
            if value.uses():
                value.const_value = tensor
                model.graph.register_initializer(value)
