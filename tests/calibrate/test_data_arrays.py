"""`.npz` and `.npy` files: naming, rows, types, order, and files that are not what they seem."""

import json

import numpy as np
import pytest

from onnxq.calibrate.data import Preprocess, open_data
from onnxq.calibrate.data import arrays as arrays_module
from onnxq.errors import DataError, UsageError
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


def test_512_rows_by_default():
    assert sum(len(batch["x"]) for batch in open_data(rows(600, 3), X)) == 512


def test_the_notes_stay_short():
    data = open_data({"x": rows(2, 3), **{f"extra{i}": rows(1, 1) for i in range(100)}}, X)
    assert data.provenance["notes"]["ignored arrays"] == ", ".join(f"extra{i}" for i in range(20))


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
    assert f"input 'x' takes float32[?, 3, 4, 5], the array is float32[{', '.join(map(str, shape))}]" in message
    assert message.endswith(advice)


def test_advice_to_transpose_is_right(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((2, 4, 5, 3), np.float32).transpose(0, 3, 1, 2))
    assert [b["x"].shape for b in open_data(tmp_path, IMAGE)] == [(2, 3, 4, 5)]


def test_preprocessing_does_not_touch_arrays():
    data = open_data(rows(2, 3), X, preprocess=Preprocess(mean=(0.5,)))
    assert [b["x"].tolist() for b in data] == [rows(2, 3).tolist()]
    assert data.provenance["notes"] == {"preprocess": "not applied: arrays are fed as they are"}


def test_empty_arrays_are_refused_but_empty_inner_axes_are_not(tmp_path):
    np.savez(tmp_path / "a.npz", x=rows(0, 3))
    assert "a.npz has no rows" in refusal(tmp_path / "a.npz")
    past = (InputSpec("past", "float32", ("N", 2, "P")),)
    assert [b["past"].shape for b in open_data({"past": np.zeros((2, 2, 0), np.float32)}, past)] == [(2, 2, 0)]


def test_the_first_file_is_looked_at_when_opening(tmp_path):
    np.savez(tmp_path / "0.npz", x=rows(2, 4))
    np.savez(tmp_path / "1.npz", x=rows(2, 3))
    with pytest.raises(DataError, match=r"0\.npz"):
        open_data(tmp_path, X)


def test_requests_that_make_no_sense():
    assert refusal(rows(1, 3), error=UsageError, samples=0) == "samples must be at least 1, not 0"
    assert refusal(rows(1, 3), error=UsageError, batch=0) == "batch must be at least 1, not 0"
