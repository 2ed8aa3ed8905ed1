"""What an ONNX file must be before it is read further: it may come from anyone.

A file is looked at from the outside in: its kind and size, its first byte, then the message without its weights, and
only then is anything computed from it. The onnx checker follows, which keeps external data inside the model's folder;
what is here is what the checker lets through: sizes that lie, text that is none, functions that multiply, and external
data where nothing reads it.
"""

from __future__ import annotations

import difflib
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from google.protobuf.message import Message

from onnxq.errors import EnvironmentFault, ModelError, UnsupportedError

LARGEST_FILE = 2**31 - 1
"""Bytes of a protobuf message; more weights go into files of their own."""
MOST_NODES = 1_000_000
"""Nodes of a graph whose functions are written out."""
_FIELDS: dict[int, str] = {
    onnx.TensorProto.FLOAT: "float_data",
    onnx.TensorProto.DOUBLE: "double_data",
    onnx.TensorProto.INT64: "int64_data",
    onnx.TensorProto.INT32: "int32_data",
}
"""Where values that are no raw bytes lie, for types that are stored one by one."""
_TYPES = {int(entry) for entry in ir.DataType}
"""Element types that can be read."""
_EXTERNAL_KEYS = {"location", "offset", "length", "checksum"}
_WIRE_TYPES = {1: 0, 2: 2, 3: 2, 4: 2, 5: 0, 6: 2, 7: 2, 8: 2, 14: 2, 20: 2, 25: 2, 26: 2}
_FIRST_BYTES = {(field << 3 | wire) & 0x7F | (0x80 if field > 15 else 0) for field, wire in _WIRE_TYPES.items()}
"""How a message with a field of ModelProto in front begins: its number and wire type, the low seven bits first."""


def require_readable(path: str | Path) -> Path:
    """The resolved path of a non-empty regular file; its absence is a `ModelError` that suggests near names."""
    source = Path(path)
    try:
        mode = source.stat().st_mode
    except FileNotFoundError:
        siblings = [p.name for p in source.parent.glob("*.onnx")] if source.parent.is_dir() else []
        near = difflib.get_close_matches(source.name, siblings, n=1)
        hint = f" Did you mean {source.parent / near[0]}?" if near else ""
        raise ModelError(f"{source} does not exist.{hint}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{source} cannot be read: {getattr(error, 'strerror', None) or error}.") from error
    if stat.S_ISDIR(mode):
        raise ModelError(f"{source} is a folder; give the .onnx file itself.")
    if not stat.S_ISREG(mode):
        raise ModelError(f"{source} is not a regular file.")
    if source.stat().st_size == 0:
        raise ModelError(f"{source} is empty.")
    if not os.access(source, os.R_OK):
        raise EnvironmentFault(f"{source} cannot be read: permission denied.")
    return source.resolve()


def require_message(source: Path) -> None:
    """Refuse what cannot be an ONNX file by its size or its first byte, before it is read.

    Raises:
        ModelError: It is too large for a protobuf message, or begins with no field of a model.
    """
    if source.stat().st_size > LARGEST_FILE:
        raise ModelError(
            f"{source.name} is not an ONNX file: it is larger than 2 GB, which no such file can be; save the model "
            "with external data."
        )
    with source.open("rb") as file:
        first = file.read(1)
    if first and first[0] not in _FIRST_BYTES:
        raise ModelError(f"{source.name} is not an ONNX file: it begins with the byte 0x{first[0]:02x}.")


def check(proto: onnx.ModelProto, source: Path) -> None:
    """Refuse a message that is no valid model, or one that cannot be read in bounded time and memory.

    Args:
        proto: The message without its external data.
        source: The file it came from.

    Raises:
        ModelError: It is not valid.
        UnsupportedError: It is, but it is made of parts that onnxq does not read.
        EnvironmentFault: Its weights do not fit this machine's memory.
    """
    if not proto.HasField("graph") or not proto.graph.node:
        raise ModelError(f"{source.name} is not an ONNX model: it holds no graph.")
    if not proto.graph.output:
        raise ModelError(f"{source.name} has no outputs.")
    _check_parts(proto, source)
    try:
        onnx.checker.check_model(str(source))
    except (onnx.checker.ValidationError, UnicodeDecodeError) as error:
        raise ModelError(f"{source.name} is not a valid ONNX model: {one_line(error)}") from error
    nodes = _inlined_nodes(proto)
    if nodes > MOST_NODES:
        raise UnsupportedError(f"{source.name} has {nodes:.2g} nodes with its functions written out: too many.")


def _check_parts(proto: onnx.ModelProto, source: Path) -> None:
    """Look at every text, tensor and graph."""
    outside = 0
    for part, owner in _parts(proto):
        if isinstance(part, bytes):
            raise ModelError(f"{source.name} is not a valid ONNX model: {part[:40]!r} is not UTF-8 text.")
        if isinstance(part, onnx.TensorProto) and part.data_type not in _TYPES:
            raise ModelError(
                f"{source.name} is not a valid ONNX model: tensor {part.name!r} has the unknown element type "
                f"{part.data_type}."
            )
        if isinstance(part, onnx.TensorProto) and part.data_location != onnx.TensorProto.EXTERNAL:
            _check_payload(part, source)
        elif isinstance(part, onnx.TensorProto):
            outside += _check_external(part, source)
            if isinstance(owner, onnx.AttributeProto):
                raise UnsupportedError(
                    f"{source.name} keeps the value of attribute {owner.name!r} in another file: save the model with "
                    "external data for initializers only."
                )
        if isinstance(part, onnx.SparseTensorProto):
            raise UnsupportedError(f"{source.name} holds sparse weights: make them dense.")
    memory = _memory_bytes()
    if memory is not None and outside > memory:
        raise EnvironmentFault(
            f"the weights of {source.name} take {outside / 1e9:.3g} GB, the memory of this machine is "
            f"{memory / 1e9:.3g} GB."
        )


def _parts(message: Any, owner: Any = None) -> Iterator[tuple[Any, Any]]:
    """Texts that are no UTF-8 (as bytes) and the messages below `message`, each with the message that holds it.

    The payload of tensors is not touched.
    """
    yield message, owner
    if isinstance(message, onnx.TensorProto):
        named = [message.name, message.doc_string]
        yield from ((text, message) for text in named if isinstance(text, bytes))
        return
    for field, value in message.ListFields():
        values = (value,) if isinstance(value, str | bytes | Message) else value
        if field.type == field.TYPE_STRING:
            yield from ((text, message) for text in values if isinstance(text, bytes))
        elif field.type == field.TYPE_MESSAGE:
            for entry in values:
                yield from _parts(entry, message)


def _check_payload(tensor: onnx.TensorProto, source: Path) -> None:
    """Refuse a tensor whose values are not as many as its shape says."""
    needed = _needed_bytes(tensor)
    if needed is None:
        return
    if tensor.HasField("raw_data"):
        there, wanted = len(tensor.raw_data), needed
    else:
        field = _FIELDS.get(tensor.data_type)
        wanted = math.prod(tensor.dims)
        there = len(getattr(tensor, field)) if field is not None else wanted
    if there != wanted:
        raise ModelError(
            f"{source.name} is not a valid ONNX model: tensor {tensor.name!r} of shape {list(tensor.dims)} holds "
            f"{there} values or bytes instead of {wanted}."
        )


def _check_external(tensor: onnx.TensorProto, source: Path) -> int:
    """Refuse what does not say plainly where its bytes are; returns their number."""
    entries = {str(entry.key): str(entry.value) for entry in tensor.external_data}
    unknown = sorted(set(entries) - _EXTERNAL_KEYS)
    if unknown:
        raise ModelError(f"{source.name}: external data of {tensor.name!r} has the unknown entry {unknown[0]!r}.")
    file = source.parent / entries.get("location", "")
    if not _is_file(file):
        raise ModelError(
            f"{source.name}: the file with the weights of {tensor.name!r}, {one_line(repr(entries.get('location')))}, "
            "is not beside the model."
        )
    needed = _needed_bytes(tensor) or 0
    offset, length = (_number(entries, key, tensor, source) for key in ("offset", "length"))
    if (offset or 0) + max(length or 0, needed) > file.stat().st_size:
        raise ModelError(f"{source.name}: {file.name} is too short for the weights of {tensor.name!r}.")
    if length is not None and length != needed:
        raise ModelError(
            f"{source.name}: {length} bytes of external data for {tensor.name!r}, which takes {needed} by its shape."
        )
    return needed


def _number(entries: Mapping[str, str], key: str, tensor: onnx.TensorProto, source: Path) -> int | None:
    text = entries.get(key)
    if text is None:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 20):
        raise ModelError(f"{source.name}: external data of {tensor.name!r} has a malformed offset or length.")
    return int(text)


def _is_file(path: Path) -> bool:
    with suppress(OSError, ValueError):
        return path.is_file()
    return False


def _needed_bytes(tensor: onnx.TensorProto) -> int | None:
    """Bytes of a tensor of that shape and type; None where the type has no size, or is none (the checker says so)."""
    with suppress(ValueError, TypeError, KeyError):
        bits: int = math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth
        return (bits + 7) // 8
    return None


def _inlined_nodes(proto: onnx.ModelProto) -> float:
    """Nodes of the main graph after every call of a function is replaced by its body; the checker ruled out cycles."""
    bodies = {(body.domain, body.name, getattr(body, "overload", "")): body for body in proto.functions}
    known: dict[tuple[str, str, str], float] = {}

    def count(nodes: Any) -> float:
        total = 0.0
        for node in nodes:
            key = (node.domain, node.op_type, getattr(node, "overload", ""))
            if key in bodies:
                if key not in known:
                    known[key] = count(bodies[key].node)
                total += known[key]
            else:
                total += 1
            for attribute in node.attribute:
                for body in (attribute.g, *attribute.graphs):
                    total += count(body.node)
        return total

    return count(proto.graph.node)


def _memory_bytes() -> int | None:
    with suppress(AttributeError, ValueError, OSError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def one_line(error: BaseException | str) -> str:
    """A message on one line, cut where it is long; of an error that others led to, theirs."""
    while isinstance(error, BaseException) and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else f"{text[:197]}..."
