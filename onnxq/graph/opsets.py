"""Newer operator sets for models that mean the same in them."""

from __future__ import annotations

import onnx
import onnx_ir as ir

_14 = ("Add", "CumSum", "Div", "GRU", "Identity", "LSTM", "Mul", "RNN", "Relu", "Reshape", "Sub")
_21 = (
    "Cast", "ConstantOfShape", "DequantizeLinear", "Equal", "Flatten", "LeakyRelu", "PRelu", "Pow", "QuantizeLinear",
    "Shape", "Size", "Squeeze", "Transpose", "Unsqueeze", "Where",
)  # fmt: skip
COMPATIBLE = {14: _14, 21: _14 + _21}
"""Opset -> operators that changed since 13 and only took more types, or attributes whose default is the old meaning."""


def raise_opset(model: ir.Model, version: int) -> bool:
    """Declare that `model` uses the standard operator set `version`, if every node means the same there.

    Args:
        model: Of opset 13 or newer; edited in place.
        version: A key of `COMPATIBLE`, or anything that the model's own is not below.

    Returns:
        Whether the model is now of `version` or newer; otherwise it is as it was.
    """
    domain = "ai.onnx" if "ai.onnx" in model.opset_imports else ""
    now = model.opset_imports.get(domain, 1)
    if now >= version:
        return True
    for graph in model.graphs():
        for node in graph:
            if node.domain in ("", "ai.onnx") and not _same(node, now, version):
                return False
    model.opset_imports[domain] = version
    return True


def _same(node: ir.Node, old: int, new: int) -> bool:
    if node.op_type == "BatchNormalization":  # one form of it trained, with more outputs
        return len(node.outputs) == 1
    try:
        versions = {onnx.defs.get_schema(node.op_type, version, "").since_version for version in (old, new)}
    except onnx.defs.SchemaError:
        return False
    return len(versions) == 1 or node.op_type in COMPATIBLE.get(new, ())
