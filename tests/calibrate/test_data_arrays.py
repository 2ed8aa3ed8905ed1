"""`.npz` and `.npy` files: naming, rows, types, order, and files that are not what they seem."""

import io
import json
import struct
import zipfile

import numpy as np
import pytest

from onnxq.calibrate.data import Preprocess, open_data
from onnxq.calibrate.data import arrays as arrays_module
from onnxq.errors import DataError, EnvironmentFault, UnsupportedError, UsageError
from onnxq.types import Dataset, InputSpec

X = (InputSpec("x", "float32", ("N", 3)),)
TEXT = (InputSpec("ids", "int64", ("N", "S")), InputSpec("mask", "int64", ("N", "S")))
IMAGE = (InputSpec("x", "float32", ("N", 3, 4, 5)),)


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


def test_folder_in_natural_order_with_batches_as_stored(tmp_path):
    for name, start, count in (("10", 30, 1), ("9", 10, 2), ("b2", 40, 1)):
        np.savez(tmp_path / f"{name}.npz", x=rows(count, 3) + start)
    data = open_data(tmp_path, X)
    assert isinstance(data, Dataset)
    assert [batch["x"][:, 0].tolist() for batch in data] == [[10, 13], [30], [40]]
    assert [batch["x"].dtype for batch in data] == [np.float32] * 3


def test_provenance_is_json_and_names_no_folder_above(tmp_path):
    folder = tmp_path / "calib"
    folder.mkdir()
    np.savez(folder / "0.npz", x=rows(2, 3), extra=1)
    data = open_data(folder, X, samples=5)
    list(data)
    assert json.loads(json.dumps(data.provenance)) == {
        "kind": "arrays",
        "name": "calib",
        "files": {"found": 1, "used": 1},
        "samples": 5,
        "batch": None,
        "unit": "row",
        "notes": {"ignored arrays": "extra"},
    }


def test_large_batches_are_cut_at_64_rows_or_at_the_batch_asked_for(tmp_path):
    np.savez(tmp_path / "a.npz", x=rows(150, 3))
    path = tmp_path / "a.npz"
    assert [len(b["x"]) for b in open_data(path, X)] == [64, 64, 22]
    assert [len(b["x"]) for b in open_data(path, X, batch=100)] == [64, 64, 22]
    assert [len(b["x"]) for b in open_data(path, X, batch=40)] == [40, 40, 40, 30]
    assert np.array_equal(np.concatenate([b["x"] for b in open_data(path, X, batch=7)]), rows(150, 3))


def test_samples_takes_the_first_rows(tmp_path):
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", x=rows(4, 3) + 100 * i)
    data = open_data(tmp_path, X, samples=6)
    assert [batch["x"][:, 0].tolist() for batch in data] == [[0, 3, 6, 9], [100, 103]]
    assert [len(batch["x"]) for batch in open_data(tmp_path, X, samples=4)] == [4]


def test_rows_behind_the_last_sample_are_not_read(tmp_path):
    np.savez(tmp_path / "0.npz", x=rows(2, 3))
    (tmp_path / "1.npz").write_bytes(b"broken")
    assert [len(b["x"]) for b in open_data(tmp_path, X, samples=2)] == [2]
    assert "1.npz" in refusal(tmp_path, samples=3)


def test_more_files_than_samples_gives_evenly_spaced_ones(tmp_path):
    for i in range(10):
        np.save(tmp_path / f"{i}.npy", np.full(3, i, np.float32))
    data = open_data(tmp_path, X, samples=4)
    assert np.concatenate([b["x"][:, 0] for b in data]).tolist() == [0, 2, 5, 7]
    assert data.provenance["files"] == {"found": 10, "used": 4}


def test_single_samples_get_a_batch_axis_and_are_stacked(tmp_path):
    for i in range(5):
        np.savez(tmp_path / f"{i}.npz", x=np.full(3, i, np.float32))
    assert [b["x"][:, 0].tolist() for b in open_data(tmp_path, X, batch=2)] == [[0, 1], [2, 3], [4]]


def test_stacking_stops_where_the_length_changes_and_at_stored_batches(tmp_path):
    shapes = [(4,), (4,), (6,), (2, 6), (6,)]
    for i, shape in enumerate(shapes):
        np.savez(tmp_path / f"{i}.npz", ids=np.full(shape, i), mask=np.ones(shape, np.int64))
    got = [batch["ids"] for batch in open_data(tmp_path, TEXT)]
    assert [a.shape for a in got] == [(2, 4), (1, 6), (2, 6), (1, 6)]
    assert [a[-1, 0] for a in got] == [1, 2, 3, 4]


def test_npy_is_mapped_not_loaded(tmp_path):
    np.save(tmp_path / "a.npy", np.asfortranarray(rows(100, 3)))
    source = open_data(tmp_path / "a.npy", X).source
    with arrays_module.open_arrays(tmp_path / "a.npy", "a.npy") as named:
        assert isinstance(named.load(named.names[0]), np.memmap)
    for batch in open_data(tmp_path / "a.npy", X):
        assert type(batch["x"]) is np.ndarray
        assert batch["x"].flags.c_contiguous
        assert batch["x"].flags.owndata
    assert source.about == {"kind": "arrays"}


def test_a_batch_is_a_copy_of_what_was_given():
    given = rows(4, 3)
    for batch in open_data(given, X):
        batch["x"][:] = -1
    assert np.array_equal(given, rows(4, 3))


def test_reading_again_gives_the_same(tmp_path):
    np.savez(tmp_path / "a.npz", x=rows(9, 3))
    data = open_data(tmp_path, X)
    first, second = ([b["x"] for b in data] for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("key", ["data", "input"])
def test_the_only_array_is_the_only_input(tmp_path, key):
    np.savez(tmp_path / "a.npz", **{key: rows(2, 3), "y": np.arange(2)})
    assert [b["x"].tolist() for b in open_data(tmp_path, X)] == [rows(2, 3).tolist()]


def test_a_label_key_that_is_an_input_is_data(tmp_path):
    np.savez(tmp_path / "a.npz", y=rows(2, 3))
    (batch,) = open_data(tmp_path, (InputSpec("y", "float32", (None, 3)),))
    assert list(batch) == ["y"]


def test_missing_inputs_say_what_is_there_and_what_would_fit(tmp_path):
    folder = tmp_path / "calibration"
    folder.mkdir()
    np.savez(folder / "000.npz", ids=np.ones((2, 4), np.int64), other=1)
    assert refusal(folder, TEXT) == (
        "calibration/000.npz: no array for input 'mask' (found ids, other): give "
        "np.savez('calibration/000.npz', ids=int64[?, ?], mask=int64[?, ?])"
    )
    np.savez(folder / "000.npz", a=1, b=2)
    assert "no array for inputs 'ids', 'mask' (found a, b)" in refusal(folder, TEXT)


def test_names_that_python_cannot_spell_are_shown_as_a_dict(tmp_path):
    np.savez(tmp_path / "a.npz", p=1, q=2)
    inputs = (InputSpec("x:0", "float32", (None, 3)),)
    assert "np.savez('a.npz', **{'x:0': float32[?, 3]})" in refusal(tmp_path / "a.npz", inputs)


def test_a_npy_cannot_feed_two_inputs(tmp_path):
    np.save(tmp_path / "a.npy", rows(2, 3))
    assert "np.savez('a.npz', ids=" in refusal(tmp_path / "a.npy", TEXT)


def test_row_counts_must_agree(tmp_path):
    np.savez(tmp_path / "a.npz", ids=np.ones((2, 4), np.int64), mask=np.ones((3, 4), np.int64))
    assert refusal(tmp_path / "a.npz", TEXT) == (
        "a.npz: the inputs differ in rows (ids 2, mask 3): give every input the same number"
    )


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((2, 4, 5, 3), "save array.transpose(0, 3, 1, 2)"),
        ((4, 5, 3), "save array.transpose(2, 0, 1)"),
        ((2, 3, 4, 4), "give np.savez('a.npz', x=float32[?, 3, 4, 5])"),
        ((2, 3), "give np.savez('a.npz', x=float32[?, 3, 4, 5])"),
    ],
)
def test_a_shape_that_does_not_fit(tmp_path, shape, advice):
    np.savez(tmp_path / "a.npz", x=np.zeros(shape, np.float32))
    message = refusal(tmp_path / "a.npz", IMAGE)
    assert (
        f"input 'x' takes float32[?, 3, 4, 5], the array is float32[{', '.join(map(str, shape))}]" in message
    )
    assert message.endswith(advice)


def test_advice_to_transpose_is_right(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 4, 5, 3), np.float32).transpose(0, 3, 1, 2))
    assert [b["x"].shape for b in open_data(tmp_path, IMAGE)] == [(2, 3, 4, 5)]


@pytest.mark.parametrize(
    ("stored", "wanted", "note"),
    [
        ("float64", "float32", "float64 to float32"),
        ("float16", "float32", "float16 to float32"),
        ("int32", "int64", "int32 to int64"),
        ("int64", "int32", "int64 to int32"),
        ("uint8", "float32", "uint8 to float32, values as stored"),
        ("bool", "int64", "bool to int64"),
        ("int64", "bool", "int64 to bool"),
    ],
)
def test_casts_that_keep_the_values(stored, wanted, note):
    given = np.array([[0, 1, 1]]).astype(stored)
    data = open_data(given, (InputSpec("x", wanted, ("N", 3)),))
    (batch,) = data
    assert batch["x"].dtype == wanted
    assert batch["x"].tolist() == [[0, 1, 1]]
    assert data.provenance["notes"] == {"cast x": note}


def test_another_byte_order_is_no_cast():
    data = open_data(rows(2, 3).astype(">f4"), X)
    (batch,) = data
    assert batch["x"].dtype == np.dtype("=f4")
    assert batch["x"].tolist() == rows(2, 3).tolist()
    assert data.provenance["notes"] == {}


@pytest.mark.parametrize(
    ("value", "stored", "wanted", "said"),
    [
        (1.5, "float32", "int64", "takes int64, the array is float32"),
        (1, "float64", "bool", "takes bool, the array is float64"),
        (1j, "complex64", "float32", "takes float32, the array is complex64"),
        ("a", "<U1", "float32", "takes float32, the array is <U1"),
        (2**31, "int64", "int32", "takes int32, which cannot hold 2147483648 at [0, 0]"),
        (-1, "int64", "uint8", "takes uint8, which cannot hold -1 at [0, 0]"),
        (2**24 + 1, "int64", "float32", "takes float32, which cannot hold 16777217 at [0, 0]"),
        (2, "int64", "bool", "takes bool, which cannot hold 2 at [0, 0]"),
        (1e39, "float64", "float32", "takes float32, which cannot hold 1e+39 at [0, 0]"),
    ],
)
def test_casts_that_would_lose_something(value, stored, wanted, said):
    assert said in refusal(np.array([[value]], stored), (InputSpec("x", wanted, ("N", 1)),))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_found(tmp_path, value):
    bad = rows(200, 3)
    bad[130, 1] = value
    bad[140, 0] = value
    np.savez(tmp_path / "a.npz", x=bad)
    assert refusal(tmp_path / "a.npz") == (
        f"a.npz: input 'x' holds {value} at [130, 1]: replace or remove it"
    )


def test_an_input_without_a_numpy_type():
    assert "takes bfloat16" in refusal(rows(1, 3), (InputSpec("x", "bfloat16", (1, 3)),), UnsupportedError)
    assert "no inputs" in refusal(rows(1, 3), (), UnsupportedError)


def test_a_fixed_first_axis_gets_exactly_its_rows(tmp_path):
    for i, count in enumerate((3, 1, 4)):
        np.savez(tmp_path / f"{i}.npz", x=np.full((count, 3), i, np.float32))
    data = open_data(tmp_path, (InputSpec("x", "float32", (2, 3)),))
    assert [b["x"][:, 0].tolist() for b in data] == [[0, 0], [0, 1], [2, 2], [2, 2]]
    assert data.provenance["batch"] == 2
    assert data.provenance["unit"] == "batch"


def test_rows_that_do_not_fill_a_fixed_batch_are_dropped():
    data = open_data(rows(7, 3), (InputSpec("x", "float32", (3, 3)),))
    assert [b["x"][:, 0].tolist() for b in data] == [[0, 3, 6], [9, 12, 15]]
    assert data.provenance["notes"] == {"dropped": "rows that do not fill the model's batch of 3: 1"}


def test_too_few_rows_for_one_fixed_batch_repeat_the_last():
    data = open_data(rows(2, 3), (InputSpec("x", "float32", (4, 3)),))
    assert [b["x"][:, 0].tolist() for b in data] == [[0, 3, 3, 3]]
    notes = {"repeated": "the last row, 2 times, to fill the model's batch of 4"}
    assert data.provenance["notes"] == notes


def test_a_fixed_batch_never_mixes_lengths(tmp_path):
    for i, shape in enumerate([(3, 4), (3, 5), (1, 5)]):
        np.savez(tmp_path / f"{i}.npz", x=np.full(shape, i, np.float32))
    data = open_data(tmp_path, (InputSpec("x", "float32", (2, "S")),))
    assert [b["x"].shape for b in data] == [(2, 4), (2, 5), (2, 5)]
    assert [b["x"][:, 0].tolist() for b in data] == [[0, 0], [1, 1], [1, 2]]
    assert data.provenance["notes"] == {"dropped": "rows that do not fill the model's batch of 2: 1"}


def test_sizes_below_one_are_dynamic():
    assert [len(b["x"]) for b in open_data(rows(5, 3), (InputSpec("x", "float32", (0, -1)),))] == [5]


def test_inputs_without_a_common_row_axis_are_whole_feeds(tmp_path):
    inputs = (InputSpec("x", "float32", ("N", 3)), InputSpec("limit", "float32", ()))
    for i in range(3):
        np.savez(tmp_path / f"{i}.npz", x=rows(70, 3), limit=np.float32(i))
    data = open_data(tmp_path, inputs, samples=2)
    got = list(data)
    assert [(b["x"].shape, b["limit"].shape) for b in got] == [((70, 3), ())] * 2
    assert [float(b["limit"]) for b in got] == [0, 1]
    assert data.provenance["unit"] == "batch"


def test_preprocessing_does_not_touch_arrays():
    data = open_data(rows(2, 3), X, preprocess=Preprocess(mean=(9.0,)))
    assert [b["x"].tolist() for b in data] == [rows(2, 3).tolist()]
    assert data.provenance["notes"] == {"preprocess": "not applied: arrays are fed as they are"}


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


def test_records_are_no_numbers(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3, [("a", "f4"), ("b", "f4")]))
    assert "takes float32, the array is" in refusal(tmp_path / "a.npy", (InputSpec("x", "float32", (None,)),))


def test_empty_arrays_are_refused_but_empty_inner_axes_are_not(tmp_path):
    np.savez(tmp_path / "a.npz", x=rows(0, 3))
    assert "a.npz has no rows" in refusal(tmp_path / "a.npz")
    past = (InputSpec("past", "float32", ("N", 2, "P")),)
    assert [b["past"].shape for b in open_data({"past": np.zeros((2, 2, 0), np.float32)}, past)] == [
        (2, 2, 0)
    ]


def test_the_first_file_is_looked_at_when_opening(tmp_path):
    np.savez(tmp_path / "0.npz", x=rows(2, 4))
    np.savez(tmp_path / "1.npz", x=rows(2, 3))
    with pytest.raises(DataError, match=r"0\.npz"):
        open_data(tmp_path, X)


def test_requests_that_make_no_sense():
    assert refusal(rows(1, 3), error=UsageError, samples=0) == "samples must be at least 1, not 0"
    assert refusal(rows(1, 3), error=UsageError, batch=0) == "batch must be at least 1, not 0"


def test_no_permission(tmp_path, monkeypatch):
    np.save(tmp_path / "a.npy", rows(2, 3))

    def denied(*_args, **_options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.open", denied)
    assert refusal(tmp_path / "a.npy", error=EnvironmentFault) == "a.npy: no permission to read it"
