"""ONNX files in and out."""

from __future__ import annotations

import glob
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError

from onnxq.errors import EnvironmentFault, ModelError
from onnxq.graph.checks import check, one_line, require_message, require_readable
from onnxq.graph.edit import tidy
from onnxq.graph.look import opset
from onnxq.graph.opsets import converted
from onnxq.graph.parts import WHOLE, Arrays, bare, lift_weights, put_back

OPSET_FLOOR = 13
"""Per-channel QuantizeLinear / DequantizeLinear begin here, and every operator has one meaning from here on."""
SINGLE_FILE_LIMIT = 1_900_000_000
"""Above this many bytes of weights a protobuf file is not safe and the weights go into a second file."""
IR_VERSIONS = {
    13: 7,
    14: 7,
    15: 8,
    16: 8,
    17: 8,
    18: 8,
    19: 9,
    20: 9,
    21: 10,
    22: 10,
    23: 11,
    24: 12,
    25: 13,
    26: 13,
}
"""Opset -> the IR version of the onnx release that introduced it."""
NOTE = "onnxq.note"
"""Where a model in memory keeps what `note` tells; it is not written to files."""


def load(path: str | Path) -> ir.Model:
    """Read an ONNX file of opset 7 or newer.

    Functions are inlined, initializers are dropped from the graph's inputs, every node gets a unique name, and a model
    of an opset below 13 is converted to 13. External data is read into memory; above the size of a protobuf message it
    stays on disk, memory-mapped. `note` tells what went wrong on the way.

    Raises:
        ModelError: The file is missing, not ONNX, or invalid.
        UnsupportedError: Its operator set is too old or cannot be converted.
    """
    source = require_readable(path)
    require_message(source)
    try:
        proto = onnx.load(source, format="protobuf", load_external_data=False)
    except (DecodeError, onnx.checker.ValidationError, ValueError, OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{source.name} is not an ONNX file: {one_line(error)}") from error
    check(proto, source)
    proto, note = converted(proto, source, OPSET_FLOOR)
    arrays: Arrays = {}
    try:
        if proto.ByteSize() >= WHOLE:
            proto, arrays = lift_weights(proto)
        model = ir.from_proto(proto)
        put_back(model, arrays)
        model.meta[NOTE] = note
        ir.external_data.set_base_dir(model.graph, source.parent)
        tidy(model)
        if nbytes(model) <= SINGLE_FILE_LIMIT:
            ir.external_data.load_to_model(model)
    except Exception as error:
        raise ModelError(f"{source.name} is not a valid ONNX model: {one_line(error)}") from error
    return model


def note(model: ir.Model) -> str:
    """What reading the file had to do without, as a sentence; "" where nothing."""
    return str(model.meta.get(NOTE) or "")


def parse(path: Path) -> ir.Model:
    """Read a file as it is, without checks or changes, weights included: for files this program made itself."""
    proto = onnx.load(path)
    return ir.from_proto(proto)


def lowest_ir_version(model: ir.Model) -> int:
    """The oldest IR version that goes with the model's operator set."""
    return IR_VERSIONS.get(opset(model), model.ir_version)


def nbytes(model: ir.Model) -> int:
    """Bytes of all initializers."""
    return sum(
        value.const_value.nbytes
        for graph in model.graphs()
        for value in graph.initializers.values()
        if value.const_value is not None
    )


def to_bytes(model: ir.Model) -> bytes:
    """The model as one protobuf message, weights included; equal models give equal bytes.

    Raises:
        ValueError: The weights do not fit a protobuf message (2 GB).
    """
    if nbytes(model) > SINGLE_FILE_LIMIT:
        raise ValueError("the model is too large for one protobuf message")
    data: bytes = ir.to_proto(_in_memory(model)).SerializeToString(deterministic=True)
    return data


def _in_memory(model: ir.Model) -> ir.Model:
    """`model`, or a copy with its external weights read in: the mapped ones may be shared with other models."""
    if not any(isinstance(value.const_value, ir.ExternalTensor) for value in model.graph.initializers.values()):
        return model
    copy = model.clone()
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=tensor.name)
    return copy


def disk_bytes(path: Path) -> int:
    """Bytes of a model file and of the files with its external weights."""
    return sum(file.stat().st_size for file in model_files(path))


def model_files(path: Path) -> list[Path]:
    """A model file and the files with its external weights."""
    files = {
        str(entry.value): path.parent / str(entry.value)
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    return [path, *files.values()]


def file_digest(path: Path) -> str:
    """SHA-256 of a file, as hex; read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(model: ir.Model) -> str:
    """SHA-256 over the graph and its weights, as hex."""
    state = hashlib.sha256()
    state.update(bare(model).SerializeToString(deterministic=True))
    for name, value in sorted(model.graph.initializers.items()):
        state.update(f"{name} {value.dtype} {value.shape}".encode())
        if value.const_value is not None:
            state.update(value.const_value.tobytes())
    return state.hexdigest()


def save(model: ir.Model, path: str | Path, *, external: bool | None = None) -> None:
    """Write `model` to `path`: either the whole new file appears or nothing changes.

    Args:
        model: Left as it is.
        path: Destination; replaced when it exists.
        external: Put the weights into `<path>.data`, or `<path>.1.data` where that exists; None: only when they do not
            fit one file.

    Raises:
        EnvironmentFault: The folder cannot be written or the disk is full.
    """
    target = Path(path)
    if external is None:
        external = nbytes(model) > SINGLE_FILE_LIMIT
    try:
        if external:
            _save_in_two(model, target)
            return
        with atomic_path(target) as temporary:
            temporary.write_bytes(to_bytes(model))
    except OSError as error:
        raise EnvironmentFault(f"{target} cannot be written: {error.strerror or error}.") from error


def _save_in_two(model: ir.Model, target: Path) -> None:
    """Write the graph and its weights beside each other in a folder of their own, then move both into place.

    The weights never replace a file: a model that is still there would read them. Those of the model that is replaced
    are removed at the end.
    """
    before = sorted(target.parent.glob(f"{glob.escape(target.name)}.*data"))
    taken = {file.name for file in before}
    names = (f"{target.name}.{number}data" for number in ("", *(f"{count}." for count in range(1, len(taken) + 1))))
    weights = next(name for name in names if name not in taken)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent) as folder:
        made = Path(folder) / target.name
        ir.save(model, made, external_data=weights)
        files = [file for file in (made.with_name(weights), made) if file.exists()]
        for file in files:
            with file.open("rb") as written:
                os.fsync(written.fileno())
        try:
            for file in files:
                file.replace(target.with_name(file.name))
        except BaseException:
            if made.exists():  # the model that reads the weights did not follow them
                target.with_name(weights).unlink(missing_ok=True)
            raise
    for file in before:
        if re.fullmatch(r"\.(\d+\.)?data", file.name.removeprefix(target.name)):
            file.unlink()


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """A temporary path in the folder of `target` that replaces it when the block ends well, else disappears."""
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent or Path())
    temporary = Path(name)
    try:
        with os.fdopen(handle):
            os.fchmod(handle, 0o666 & ~_umask())
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(target)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
