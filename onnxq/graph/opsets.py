"""Newer operator sets for older models: converted, or declared where the operators mean the same in them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxq.errors import UnsupportedError
from onnxq.graph.checks import one_line
from onnxq.graph.confine import run_confined

_14 = ("Add", "CumSum", "Div", "GRU", "Identity", "LSTM", "Mul", "RNN", "Relu", "Reshape", "Sub")
_21 = (
    "Cast", "ConstantOfShape", "DequantizeLinear", "Equal", "Flatten", "LeakyRelu", "PRelu", "Pow", "QuantizeLinear",
    "Shape", "Size", "Squeeze", "Transpose", "Unsqueeze", "Where",
)  # fmt: skip
COMPATIBLE = {14: _14, 21: _14 + _21}
"""Opset -> operators that changed since 13 and only took more types, or attributes whose default is the old meaning."""
OLDEST = 7
"""Operator sets below were never stable."""
CONVERTER = Path(__file__).with_name("converter.py")
"""The program that converts; it knows the operator set that `load` wants."""
CONVERT_SECONDS, CONVERT_BYTES = 120.0, 4 << 30
"""Limits of conversion: time, and address space beside eight times the weights."""


def converted(proto: onnx.ModelProto, source: Path, version: int) -> tuple[onnx.ModelProto, str]:
    """A model of operator set `version` or newer that computes the same.

    The converter of the onnx package is native code: it runs in a child process with limits of time and memory. Where
    it fails, the version is only declared, if every operator has the same inputs, outputs and attributes there.

    Args:
        proto: Without its external data.
        source: The file it came from.
        version: At most 13, for which the child's program is written.

    Returns:
        The model, with its external data read in where it was converted; and what went wrong, or "".

    Raises:
        UnsupportedError: It is too old, or neither way leads to `version`.
    """
    now = _version(proto)
    if now >= version:
        return proto, ""
    if now < OLDEST:
        raise UnsupportedError(
            f"{source.name} uses opset {now}; onnxq reads opset {OLDEST} and newer. "
            "Export it again with a newer exporter."
        )
    try:
        return _converted(proto, source), ""
    except (OSError, ValueError, DecodeError, _ConversionError) as error:
        reason = f"conversion from opset {now} to {version} {one_line(error)}"
    if proto.functions:
        raise UnsupportedError(f"{source.name}: {reason}; export it again with opset {version} or newer.")
    node = next((node for node in _nodes(proto.graph) if not _same_form(node, now, version)), None)
    if node is not None:
        raise UnsupportedError(f"{source.name}: {reason}, and {node.op_type} means something else there.")
    declared = onnx.ModelProto()
    declared.CopyFrom(proto)
    for entry in declared.opset_import:
        if entry.domain in ("", "ai.onnx"):
            entry.version = version
    return declared, f"{reason}; continuing without it: its operators mean the same there"


class _ConversionError(Exception):
    """Why the converter left no model, as a predicate."""


def _converted(proto: onnx.ModelProto, source: Path) -> onnx.ModelProto:
    whole = onnx.ModelProto()
    whole.CopyFrom(proto)
    onnx.load_external_data_for_model(whole, str(source.parent))
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        given, made = Path(folder) / "model.onnx", Path(folder) / "converted.onnx"
        content = whole.SerializeToString()
        given.write_bytes(content)
        memory = CONVERT_BYTES + 8 * len(content)
        failure = run_confined(CONVERTER, given, made, timeout_s=CONVERT_SECONDS, memory_bytes=memory)
        if failure is not None:
            raise _ConversionError(failure)
        return onnx.load(made)


def _version(proto: onnx.ModelProto) -> int:
    return int(next((entry.version for entry in proto.opset_import if entry.domain in ("", "ai.onnx")), 1))


def _nodes(graph: onnx.GraphProto) -> Iterable[onnx.NodeProto]:
    """Every node of the standard operator set, those of bodies included."""
    waiting: list[Any] = [graph]
    while waiting:
        for node in waiting.pop().node:
            for attribute in node.attribute:
                waiting += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
            if node.domain in ("", "ai.onnx"):
                yield node


def _same_form(node: onnx.NodeProto, old: int, new: int) -> bool:
    """Whether an operator has the same inputs, outputs and attributes, defaults included, in two operator sets."""
    try:
        schemas = [onnx.defs.get_schema(node.op_type, version, "") for version in (old, new)]
    except onnx.defs.SchemaError:
        return False
    if any(schema.deprecated for schema in schemas):
        return False
    before, after = (
        (
            [(value.name, value.option) for value in schema.inputs],
            [(value.name, value.option) for value in schema.outputs],
            {
                name: (value.type, value.required, value.default_value.SerializeToString())
                for name, value in schema.attributes.items()
            },
        )
        for schema in schemas
    )
    return before == after


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
