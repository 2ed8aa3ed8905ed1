"""Broken and hostile models, data and outputs: one line, the right exit code, nothing written, no payload run."""

import importlib
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import pytest
from helpers import proto, weights

from onnxq.cli.main import _run as run

TEXT = "g (float[n,3,5,5] x, float[4,3,3,3] w, float[36,5] f) => (float[n,5] y) {"
BODY = "a = Conv(x, w) b = Relu(a) c = Flatten(b) y = Gemm(c, f) }"
W, F = weights(4, 3, 3, 3), weights(36, 5)
X = weights(10, 3, 5, 5, seed=1)
EVIL = "l\n1\x1b[31mred\x07[/bold][red]\u202e\x9b\b"


def base(body=BODY, **constants):
    return proto(TEXT + body, w=W, f=F, **constants)


def quantize(folder, *options, data="data.npz"):
    """Exit code of the command on folder/model.onnx."""
    given = ["quantize", str(folder / "model.onnx"), "--data", str(data if data.startswith("/") else folder / data)]
    return run([*given, "-o", str(folder / "out.onnx"), "-q", "--no-timing", *options])


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() and not path.is_symlink() else None
        for path in folder.rglob("*")
    }


def refused(folder, capsys, code, words, *options, data="data.npz"):
    """Checks a refusal: its code, one harmless line with `words`, and that no file changed."""
    if not (folder / "data.npz").exists():
        np.savez(folder / "data.npz", x=X)
    before = contents(folder.parent)
    assert quantize(folder, *options, data=data) == code
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1
    assert lines[0].startswith("onnxq: error: ")
    assert lines[0].isprintable()
    assert "internal error" not in lines[0]
    for word in words:
        assert word in lines[0]
    assert out == ""
    assert contents(folder.parent) == before


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "work"
    made.mkdir()
    return made


# -- models -----------------------------------------------------------------------------------------------------------


def first(made):
    return made.graph.initializer[0]


def dims(*sizes):
    def change(made):
        del first(made).dims[:]
        first(made).dims.extend(sizes)

    return change


def attribute(**values):
    def change(made):
        made.graph.node[0].attribute.extend(onnx.helper.make_attribute(key, value) for key, value in values.items())

    return change


def reversed_nodes(made):
    nodes = list(made.graph.node)[::-1]
    del made.graph.node[:]
    made.graph.node.extend(nodes)


def duplicate(field):
    return lambda made: getattr(made.graph, field).append(getattr(made.graph, field)[0])


def set_type(kind):
    return lambda made: setattr(first(made), "data_type", kind)


def unknown_domain(made):
    made.graph.node[1].domain = "no.such"
    made.opset_import.append(onnx.helper.make_opsetid("no.such", 1))


def batch(size):
    return lambda made: setattr(made.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", size)


def sparse(made):
    entry = made.graph.sparse_initializer.add()
    entry.values.CopyFrom(onnx.numpy_helper.from_array(np.ones(2, np.float32), "s"))
    entry.indices.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 1])))
    entry.dims.extend([4])


def attribute_of_no_type(made):
    value = onnx.numpy_helper.from_array(np.ones(1, np.float32))
    value.data_type = 33
    made.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["unused"], value=value))


CHANGES = {
    "payload too short": (
        lambda made: setattr(first(made), "raw_data", b"1234"),
        3,
        ["4 values or bytes instead of 432"],
    ),
    "payload too long": (lambda made: setattr(first(made), "raw_data", bytes(433)), 3, ["433 values"]),
    "no payload": (lambda made: first(made).ClearField("raw_data"), 3, ["w"]),
    "two payloads": (lambda made: first(made).float_data.extend([1.0] * 108), 3, ["w"]),
    "overflowing dims": (dims(1 << 62, 4, 4, 4), 3, ["4611686018427387904"]),
    "negative dims": (dims(-4, -3, 3, 3), 3, ["Negative"]),
    "dims that lie": (dims(1 << 40, 1, 1, 1), 3, ["holds 432"]),
    "no such type": (set_type(999), 3, ["999"]),
    "no such type in an attribute": (attribute_of_no_type, 3, ["unknown element type 33"]),
    "text as raw data": (set_type(8), 3, ["STRING"]),
    "a cycle": (lambda made: made.graph.node[0].input.__setitem__(0, "c"), 3, ["sorted"]),
    "unsorted nodes": (reversed_nodes, 3, ["sorted"]),
    "a value twice": (lambda made: made.graph.node[1].output.__setitem__(0, "a"), 3, ["'a'"]),
    "an input twice": (duplicate("input"), 3, ["'x'"]),
    "a missing initializer": (lambda made: made.graph.initializer.pop(0) and None, 3, ["'w'"]),
    "an output of nothing": (lambda made: setattr(made.graph.output[0], "name", "z"), 3, ["'z'"]),
    "an unknown operator": (lambda made: setattr(made.graph.node[1], "op_type", "Frob"), 3, ["Frob"]),
    "an operator's name as an attack": (lambda made: setattr(made.graph.node[1], "op_type", EVIL), 3, ["\\x1b[31m"]),
    "an attribute twice": (attribute(group=1, kernel_shape=[3, 3]), 3, ["group"]),
    "an attribute of another type": (attribute(strides=[1.5, 1.0]), 3, ["strides"]),
    "a future opset": (lambda made: setattr(made.opset_import[0], "version", 1 << 40), 3, ["1099511627776"]),
    "opset 0": (lambda made: setattr(made.opset_import[0], "version", 0), 3, ["version of 0"]),
    "no opset": (lambda made: made.ClearField("opset_import"), 3, ["opset"]),
    "IR version 99": (lambda made: setattr(made, "ir_version", 99), 3, ["99"]),
    "a sparse initializer": (sparse, 4, ["sparse"]),
    "a batch of 2^40 rows": (batch(1 << 40), 3, ["GiB", "too much"]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_broken_model_is_refused_in_one_line(name, folder, capsys):
    change, code, words = CHANGES[name]
    made = base()
    change(made)
    if name == "an attribute twice":
        change(made)
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    refused(folder, capsys, code, words)


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda whole: whole[:100], []),
        (lambda whole: whole[:-20], []),
        (lambda whole: whole + b"\0" * 64, []),
        (lambda _: b"\0" * 10_000, ["0x00"]),
        (lambda _: b"\x89PNG\r\n\x1a\n" + b"\0" * 99, ["0x89"]),
        (lambda _: b"PK\x03\x04" + b"\0" * 99, ["0x50"]),
        (lambda _: pickle.dumps([1] * 99), ["0x80"]),
        (lambda _: b"<!DOCTYPE html>", ["0x3c"]),
        (lambda _: b"version https://git-lfs.github.com/spec/v1\n", ["0x76"]),
        (lambda _: b"\x3a\xff\xff\xff\xff\x07" + b"x" * 99, []),
        (lambda whole: whole.replace(b"Flatten", b"Fl\xff\xfeten"), ["UTF-8"]),
    ],
)
def test_what_is_no_model_is_refused(made, words, folder, capsys):
    (folder / "model.onnx").write_bytes(made(base().SerializeToString()))
    refused(folder, capsys, 3, words)


def test_a_file_larger_than_any_model_is_not_read(folder, capsys):
    (folder / "model.onnx").write_bytes(base().SerializeToString())
    os.truncate(folder / "model.onnx", 3 << 30)
    np.savez(folder / "data.npz", x=X)
    assert quantize(folder) == 3
    assert "larger than 2 GB" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["pipe", "device", "loop"])
def test_a_model_that_is_no_file_is_refused(kind, folder, capsys):
    path = folder / "model.onnx"
    {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "loop": lambda p: p.symlink_to(p)}[kind](path)
    refused(folder, capsys, 3, ["model.onnx"])


def test_functions_that_multiply_are_refused(folder, capsys):
    calls = "b = l.f{0}(a) c = l.f{0}(b) d = l.f{0}(c) e = l.f{0}(d)"
    bodies = [
        f'<domain: "l", opset_import: ["" : 17, "l" : 1]> f{i} (a) => (e) {{ {calls.format(i + 1)} }}'
        for i in range(12)
    ]
    text = f"""<ir_version: 8, opset_import: ["" : 17, "l" : 1]>
    g (float[n,4] x, float[4,4] w) => (float[n,4] y) {{ m = MatMul(x, w) y = l.f0(m) }} {" ".join(bodies)}
    <domain: "l", opset_import: ["" : 17]> f12 (a) => (e) {{ e = Relu(a) }}"""
    (folder / "model.onnx").write_bytes(onnx.parser.parse_model(text).SerializeToString())
    refused(folder, capsys, 4, ["1.7e+07 nodes", "too many"])


def test_a_model_that_never_ends_is_given_up(folder, capsys, monkeypatch):
    monkeypatch.setattr(importlib.import_module("onnxq.pipeline.prepare"), "PROBE_SECONDS", 0.5)
    loop = "Loop(trip, on, a) <body = h (int64 i, bool k, float[n,4,3,3] v) => (bool l, float[n,4,3,3] u) "
    body = BODY.replace("Relu(a)", loop + "{ l = Identity(k) u = Relu(v) }>")
    made = base(body)
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.array(1 << 62), "trip"))
    made.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "on"))
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    refused(folder, capsys, 4, ["does not finish a run within 0.5 s"])


def renamed(made, old, new):
    for node in made.graph.node:
        for names in (node.input, node.output):
            names[:] = [new if name == old else name for name in names]
    for value in (*made.graph.input, *made.graph.output, *made.graph.initializer):
        value.name = new if value.name == old else value.name


def test_names_cannot_steer_the_terminal(folder, capsys):
    made = base()
    for node in made.graph.node:
        node.name = f"{EVIL}{node.op_type}"
    for old in ("y", "a", "w"):
        renamed(made, old, EVIL + old)
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    np.savez(folder / "data.npz", x=X)
    assert quantize(folder) == 0
    assert run(["inspect", str(folder / "out.onnx")]) == 0
    out, err = capsys.readouterr()
    assert (out + err).replace("\n", "").isprintable()
    assert "\\x1b[31m" in out


# -- external data ----------------------------------------------------------------------------------------------------


def external(folder, **entries):
    """Writes model.onnx with its first weight elsewhere; w.bin and, one folder up, secret.bin hold the bytes."""
    made = base()
    raw = first(made).raw_data
    (folder / "w.bin").write_bytes(raw * 2)
    (folder.parent / "secret.bin").write_bytes(raw)
    first(made).ClearField("raw_data")
    first(made).data_location = onnx.TensorProto.EXTERNAL
    for key, value in entries.items():
        first(made).external_data.add(key=key, value=value)
    (folder / "model.onnx").write_bytes(made.SerializeToString())


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "../secret.bin"}, ["outside"]),
        ({"location": "inner/../../secret.bin"}, ["outside"]),
        ({"location": "link.bin"}, ["symbolic link"]),
        ({"location": "up/secret.bin"}, ["outside"]),
        ({"location": "hard.bin"}, ["hard link"]),
        ({"location": "/etc/passwd"}, ["absolute path"]),
        ({"location": "/proc/self/environ", "length": "432"}, []),
        ({"location": "pipe.bin"}, ["not beside"]),
        ({"location": "zero.bin"}, ["not beside"]),
        ({"location": "inner"}, ["not beside"]),
        ({"location": ""}, ["not beside"]),
        ({}, ["not beside"]),
        ({"location": "a" * 5000}, ["not beside"]),
        ({"location": "w.bin\0.x"}, ["not beside"]),
        ({"location": "no\n\x1b[31msuch"}, ["no\\n\\x1b[31msuch"]),
        ({"location": "*/_ORT_MEM_ADDR_/*", "offset": "140000000", "length": "432"}, ["not beside"]),
        ({"location": "w.bin", "offset": "-8"}, ["malformed"]),
        ({"location": "w.bin", "offset": "0_0"}, ["malformed"]),
        ({"location": "w.bin", "offset": str(1 << 70)}, ["malformed"]),
        ({"location": "w.bin", "length": str(1 << 50)}, ["too short"]),
        ({"location": "w.bin", "length": "8"}, ["8 bytes"]),
        ({"location": "w.bin", "length": "864"}, ["864 bytes"]),
        ({"location": "w.bin", "__class__": "x"}, ["'__class__'"]),
    ],
)
def test_external_data_that_lies_is_refused(entries, words, folder, capsys):
    external(folder, **entries)
    (folder / "inner").mkdir()
    (folder / "link.bin").symlink_to("w.bin")
    (folder / "up").symlink_to("..")
    (folder / "zero.bin").symlink_to("/dev/zero")
    os.link(folder.parent / "secret.bin", folder / "hard.bin")
    os.mkfifo(folder / "pipe.bin")
    refused(folder, capsys, 3, words)


def test_external_data_of_an_attribute_is_refused(folder, capsys):
    made = base()
    (folder / "w.bin").write_bytes(first(made).raw_data)
    tensor = made.graph.initializer.pop(0)
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="w.bin")
    made.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], value=tensor))
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    refused(folder, capsys, 4, ["attribute 'value'"])


def test_weights_beyond_all_memory_are_refused(folder, capsys):
    made = base()
    del first(made).dims[:]
    first(made).dims.extend([1 << 40, 1, 1, 1])
    first(made).ClearField("raw_data")
    first(made).data_location = onnx.TensorProto.EXTERNAL
    first(made).external_data.add(key="location", value="w.bin")
    (folder / "model.onnx").write_bytes(made.SerializeToString())
    (folder / "w.bin").touch()
    np.savez(folder / "data.npz", x=X)
    try:
        os.truncate(folder / "w.bin", 4 << 40)
    except OSError:
        pytest.skip("this file system holds no such sparse file")
    assert quantize(folder) == 6
    assert "the memory of this machine" in capsys.readouterr().err


# -- data -------------------------------------------------------------------------------------------------------------


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return open, (self.mark, "w")


def header(shape, descr="<f4"):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(text)) + text


def bomb(path):
    """An archive of some kilobytes whose array would take 4.8 GB."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", header("(16000000, 3, 5, 5)") + b"\0" * 100_000)


def picture_bomb(path):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(bytes(9999))))


def raw(content):
    return lambda path: path.write_bytes(content)


def stored(**arrays):
    return lambda path: np.savez(path, **arrays)


def spoiled(path):
    np.savez(path, x=X)
    content = bytearray(path.read_bytes())
    content[700] ^= 255
    path.write_bytes(content)


def outside(path):
    np.save(path.with_name("x.npy"), X)
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_name("x.npy"), "../../../x.npy")
        archive.writestr("y\x1b[31m.npy", b"")
    path.with_name("x.npy").unlink()


DATA = {
    "text.npy": (raw(b"hello"), 3, ["not a numpy array"]),
    "empty.npy": (raw(b""), 3, ["not a numpy array"]),
    "text.npz": (raw(b"hello"), 3, ["not a zip file"]),
    "huge.npy": (raw(header("(1000000000, 3, 5, 5)") + bytes(99)), 3, ["cut short"]),
    "negative.npy": (raw(header("(-10, 3, 5, 5)") + bytes(99)), 3, ["damaged header"]),
    "bool.npy": (raw(header("(True, 3, 5, 5)") + bytes(300)), 3, ["damaged header"]),
    "call.npy": (raw(header("(__import__('os').abort(),)") + bytes(99)), 3, ["cannot be read"]),
    "deep.npy": (raw(header("(" * 900 + ")" * 900)), 3, ["cannot be read"]),
    "objects.npy": (raw(header("(10,)", "|O") + bytes(99)), 3, ["Python objects"]),
    "bomb.npz": (bomb, 3, ["4.5 GiB"]),
    "spoiled.npz": (spoiled, 3, ["CRC"]),
    "outside.npz": (outside, 3, ["\\x1b[31m"]),
    "shape.npz": (stored(x=X[:, :, :4]), 3, ["takes float32[?, 3, 5, 5]"]),
    "text.npz ": (stored(x=np.array(["a"] * 10)), 3, ["<U1"]),
    "complex.npz": (stored(x=X.astype(np.complex64)), 3, ["complex64"]),
    "nan.npz": (stored(x=np.where(np.abs(X) > 2, np.nan, X)), 3, ["nan at"]),
    "inf.npz": (stored(x=np.where(np.abs(X) > 2, -np.inf, X)), 3, ["-inf at"]),
    "wide.npz": (stored(x=X.astype(np.float64) * 1e300), 3, ["cannot hold"]),
    "none.npz": (stored(x=X[:0]), 3, ["no rows"]),
    "nothing.npz": (stored(), 3, ["found nothing"]),
    "others.npz": (stored(q=X, z=X), 3, ["no array for input"]),
    "bomb.png": (picture_bomb, 3, ["pixels"]),
    "text.png": (raw(b"<svg/>"), 3, ["no readable"]),
    "gif.png": (raw(b"GIF89a" + bytes(99)), 3, ["no readable"]),
    "eps.jpg": (raw(b"%!PS-Adobe-3.0 EPSF-3.0\n"), 3, ["no readable"]),
    "e\n\x1b[31m.png": (raw(b"x"), 3, ["\\x1b[31m"]),
    "pipe.npz": (os.mkfifo, 3, ["not a regular file"]),
    "pipe.png": (os.mkfifo, 3, ["not a regular file"]),
    "zero.npy": (lambda path: path.symlink_to("/dev/zero"), 3, ["not a regular file"]),
    "away.npy": (lambda path: path.symlink_to("nowhere"), 3, ["No such file"]),
    "data.csv": (raw(b"1,2"), 3, ["1 .csv"]),
}


@pytest.mark.parametrize("name", DATA)
def test_broken_data_is_refused_in_one_line(name, folder, capsys):
    make, code, words = DATA[name]
    (folder / "model.onnx").write_bytes(base().SerializeToString())
    (folder / "data").mkdir()
    make(folder / "data" / name.strip())
    refused(folder, capsys, code, words, data="data")


def test_an_empty_folder_and_ragged_rows_are_refused(folder, capsys):
    (folder / "model.onnx").write_bytes(base().SerializeToString())
    (folder / "data").mkdir()
    refused(folder, capsys, 3, ["it is empty"], data="data")
    for index in range(3):
        np.save(folder / "data" / f"{index}.npy", X[index][:, : 5 - index // 2])
    refused(folder, capsys, 3, ["2.npy", "float32[3, 4, 5]"], data="data")


@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_nothing_is_unpickled(suffix, folder, capsys):
    mark = folder / "mark"
    array = np.array([Payload(str(mark))], object)
    (folder / "model.onnx").write_bytes(base().SerializeToString())
    with (folder / f"bad.{suffix}").open("wb") as file:
        np.save(file, array, allow_pickle=True) if suffix == "npy" else np.savez(file, x=array)
    refused(folder, capsys, 3, ["Python objects"], data=f"bad.{suffix}")
    (folder / "bad.npy").write_bytes(pickle.dumps(Payload(str(mark))))
    refused(folder, capsys, 3, ["not a numpy array"], data="bad.npy")
    assert not mark.exists()


# -- outputs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "code", "words"),
    [
        ("model.onnx", 2, ["is the input model"]),
        ("same.onnx", 2, ["is the input model"]),
        ("inner", 2, ["is a folder"]),
        ("pipe", 2, ["not a regular file"]),
        ("no/out.onnx", 6, ["does not exist"]),
        ("data.npz/out.onnx", 6, ["does not exist"]),
    ],
)
def test_an_output_that_cannot_be_is_refused(output, code, words, folder, capsys):
    (folder / "model.onnx").write_bytes(base().SerializeToString())
    (folder / "same.onnx").symlink_to("model.onnx")
    (folder / "inner").mkdir()
    os.mkfifo(folder / "pipe")
    refused(folder, capsys, code, words, "-o", str(folder / output))


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_output_without_permission_is_refused(folder, capsys):
    (folder / "model.onnx").write_bytes(base().SerializeToString())
    np.savez(folder / "data.npz", x=X)
    folder.chmod(0o500)
    refused(folder, capsys, 6, ["permission denied"])
    folder.chmod(0o700)


# -- fixes that random graphs led to ----------------------------------------------------------------------------------


def test_a_branch_that_is_cut_away_releases_what_it_captured():
    from helpers import model, ops

    from onnxq import graph

    made = model(
        """g (float[4] x, bool c) => (float[4] y) {
            a = Relu(x)
            b = If(c) <then_branch = t () => (float[4] o) { o = Neg(a) },
                       else_branch = e () => (float[4] p) { p = If(c) <
                           then_branch = u () => (float[4] q) { q = Exp(a) },
                           else_branch = v () => (float[4] r) { r = Abs(a) }> }>
            y = Sin(b)
        }"""
    )
    part = graph.sub_model(made, ["b"], ["y"])
    assert ops(part) == ["Sin"]
    assert ops(graph.sub_model(made, ["x", "c"], ["b"])) == ["Relu", "If"]


def test_payloads_of_other_kinds_are_counted(folder, capsys):
    for field, kind in (("float_data", 1), ("int64_data", 7), ("double_data", 11), ("int32_data", 6)):
        made = base()
        first(made).ClearField("raw_data")
        first(made).data_type = kind
        getattr(first(made), field).extend([1] * 107)
        (folder / "model.onnx").write_bytes(made.SerializeToString())
        refused(folder, capsys, 3, ["107 values or bytes instead of 108"])
