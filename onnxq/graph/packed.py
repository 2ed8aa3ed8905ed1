"""Constants that a file stores in other forms than they are read in: packed, and unpacked by nodes."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from onnxq.graph.edit import unique_name

INT8 = int(ir.DataType.INT8)
INT32 = int(ir.DataType.INT32)
FLOAT32 = int(ir.DataType.FLOAT)
FLOAT16 = int(ir.DataType.FLOAT16)
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def add_packed(model: ir.Model, name: str, codes: npt.NDArray[np.int8]) -> ir.Value:
    """Register an initializer of element type INT4, two codes to a byte, the first one in the lower half.

    Args:
        model: Edited in place; its operator set is 21 or newer.
        name: Wanted name, made unique.
        codes: int8 from -8 to 7, any shape.
    """
    unique = unique_name(model, name)
    halves = np.pad(codes.reshape(-1).view(np.uint8) & 15, (0, codes.size % 2)).reshape(-1, 2)
    packed = halves[:, 0] | halves[:, 1] << 4
    shape = ir.Shape(codes.shape)
    tensor = ir.PackedTensor(packed, ir.DataType.INT4, shape=shape, name=unique)
    value = ir.Value(name=unique, shape=shape, type=ir.TensorType(ir.DataType.INT4), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def sources(value: ir.Value | None) -> list[ir.Value] | None:
    """The constants behind `value`, each once, or None when it depends on anything that is fed."""
    found: dict[ir.Value, None] = {}
    seen: set[ir.Value] = set()
    waiting = [value]
    while waiting:
        current = waiting.pop()
        if current is None or current in seen:
            continue
        seen.add(current)
        node = current.producer()
        if node is not None and not node.op_type.startswith("Random"):
            if any(
                attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                for attribute in node.attributes.values()
            ):
                return None
            waiting += node.inputs
        elif node is None and current.const_value is not None and not current.is_graph_input():
            found[current] = None
        else:
            return None
    return list(found)
