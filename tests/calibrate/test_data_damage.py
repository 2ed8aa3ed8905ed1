"""Array files that are broken, hostile or not what they seem."""

import io
import struct
import zipfile

import numpy as np
import pytest

from onnxq.calibrate.data import arrays as arrays_module
from onnxq.calibrate.data import open_data
from onnxq.errors import DataError, EnvironmentFault
from onnxq.types import InputSpec

X = (InputSpec("x", "float32", ("N", 3)),)


def rows(count, *shape, dtype=np.float32):
    return np.arange(count * int(np.prod(shape))).reshape(count, *shape).astype(dtype)


def refusal(source, inputs=X, error=DataError, **options):
    """Return the message with which opening or reading is refused."""
    with pytest.raises(error) as caught:
        list(open_data(source, inputs, **options))
    message = str(caught.value)
    assert "\n" not in message
    return message


def npy_header(shape, descr="<f4"):
    text = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode()
    text += b" " * (64 - (len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def test_pickled_objects_are_never_loaded(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.array([[{"a": 1}]], object))
    np.save(tmp_path / "b.npy", np.array([[{"a": 1}]], object))
    expected = "holds Python objects, which are never loaded: save it as an array of numbers"
    assert refusal(tmp_path / "a.npz") == f"a.npz: 'x' {expected}"
    assert refusal(tmp_path / "b.npy") == f"b.npy {expected}"


def test_files_that_are_no_arrays(tmp_path):
    (tmp_path / "a.npy").write_bytes(b"some text")
    (tmp_path / "b.npz").write_bytes(b"some text")
    with zipfile.ZipFile(tmp_path / "c.npz", "w") as archive:
        archive.writestr("x.npy", b"some text")
    assert refusal(tmp_path / "a.npy") == "a.npy is not a numpy array: write it with np.save or np.savez"
    assert "b.npz: cannot be read (File is not a zip file)" in refusal(tmp_path / "b.npz")
    assert refusal(tmp_path / "c.npz").startswith("c.npz: 'x' is not a numpy array")


def test_a_header_that_promises_more_than_is_there(tmp_path):
    (tmp_path / "a.npy").write_bytes(npy_header((10**12, 3)) + b"\0" * 12)
    assert "a.npy is cut short: float32[1000000000000, 3] takes" in refusal(tmp_path / "a.npy")
    (tmp_path / "c.npy").write_bytes(npy_header((10, 3)) + b"\0" * 119)
    assert "c.npy is cut short: float32[10, 3] takes 120 bytes, only 119" in refusal(tmp_path / "c.npy")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("x.npy", npy_header((10, 3)) + b"\0" * 12)
    assert "b.npz: 'x' is cut short: float32[10, 3] takes 120 bytes, only 12" in refusal(tmp_path / "b.npz")


def test_a_compressed_array_beyond_the_limit_is_not_unpacked(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", npy_header((2**31, 3)) + b"\0" * 12)
    assert "would take 24.0 GiB (float32[2147483648, 3])" in refusal(tmp_path / "a.npz")
    monkeypatch.setattr(arrays_module, "MAX_BYTES", 119)
    np.savez_compressed(tmp_path / "b.npz", x=rows(10, 3))
    assert "too much for one array" in refusal(tmp_path / "b.npz")
    monkeypatch.setattr(arrays_module, "MAX_BYTES", 120)
    assert [len(b["x"]) for b in open_data(tmp_path / "b.npz", X)] == [10]


def test_damage_inside_a_member_is_found(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, x=rows(100, 3))
    broken = bytearray(buffer.getvalue())
    broken[600] ^= 1
    (tmp_path / "a.npz").write_bytes(broken)
    assert "a.npz: cannot be read (Bad CRC-32" in refusal(tmp_path / "a.npz")


@pytest.mark.parametrize("header", [npy_header((-1, 3)), npy_header((2, 3), "<q9"), b"\x93NUMPY\x09\x00aa"])
def test_headers_that_make_no_sense(tmp_path, header):
    (tmp_path / "a.npy").write_bytes(header + b"\0" * 64)
    assert "a.npy" in refusal(tmp_path / "a.npy")


def test_bytes_behind_the_last_element_are_damage(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", npy_header((1, 3)) + b"\0" * 13)
    assert "'x' has bytes behind its last element" in refusal(tmp_path / "a.npz")


def test_the_second_version_of_the_format_is_read(tmp_path):
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, rows(2, 3), version=(2, 0))
    assert [b["x"].tolist() for b in open_data(tmp_path / "a.npy", X)] == [rows(2, 3).tolist()]
    with (tmp_path / "b.npy").open("wb") as file:
        np.lib.format.write_array(file, rows(2, 3), version=(3, 0))
    assert "b.npy is no plain array (format (3, 0))" in refusal(tmp_path / "b.npy")


def test_a_file_among_the_arrays_that_is_none(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("readme.txt", "about")
    assert refusal(tmp_path / "a.npz").startswith("a.npz: 'readme.txt' is not a numpy array")


def test_not_enough_memory(tmp_path, monkeypatch):
    np.savez(tmp_path / "a.npz", x=rows(2, 3))

    def full(*_args, **_options):
        raise MemoryError

    monkeypatch.setattr(np.lib.format, "read_array", full)
    message = refusal(tmp_path / "a.npz", error=EnvironmentFault)
    assert message == "a.npz: not enough memory to read it: save it as several files"


def test_records_are_no_numbers(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3, [("a", "f4"), ("b", "f4")]))
    assert "takes float32, the array is" in refusal(tmp_path / "a.npy", (InputSpec("x", "float32", (None,)),))


def test_no_permission(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", rows(2, 3))

    def denied(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    assert refusal(tmp_path / "a.npy", error=EnvironmentFault) == "a.npy: no permission to read it"
