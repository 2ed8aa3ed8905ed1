"""Labelled data and splits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from onnxq.calibrate.data import LabelledDataset, open_data, open_labelled, split
from onnxq.errors import DataError, UsageError
from onnxq.types import Dataset, InputSpec

X = (InputSpec("x", "float32", ("N", 3)),)
PIXEL = (InputSpec("x", "float32", ("N", 1, 1, 1)),)


def rows(count):
    return np.arange(count * 3, dtype=np.float32).reshape(count, 3)


def labels_of(data):
    return [labels.tolist() for _, labels in data]


def refusal(source, inputs=X):
    with pytest.raises(DataError) as caught:
        open_labelled(source, inputs)
    message = str(caught.value)
    assert "\n" not in message
    return message


def pictures(folder, *names):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(np.full((1, 1), i, np.uint8)).save(path)


@pytest.mark.parametrize("key", ["label", "labels", "y", "target"])
@pytest.mark.parametrize("dtype", ["int64", "uint8", "int32"])
def test_labels_beside_the_inputs(tmp_path, key, dtype):
    np.savez(tmp_path / "a.npz", **{"x": rows(70), key: np.arange(70, dtype=dtype)})
    data = open_labelled(tmp_path / "a.npz", X)
    assert isinstance(data, LabelledDataset)
    batches = list(data)
    assert [(list(feeds), len(labels), labels.dtype) for feeds, labels in batches] == [
        (["x"], 64, np.int64),
        (["x"], 6, np.int64),
    ]
    for feeds, labels in batches:
        assert np.array_equal(feeds["x"][:, 0], 3 * labels)


def test_the_same_rows_without_labels(tmp_path):
    np.savez(tmp_path / "a.npz", x=rows(5), y=np.arange(5))
    data = open_labelled(tmp_path / "a.npz", X)
    plain = data.unlabelled()
    assert isinstance(plain, Dataset)
    assert [list(feeds) for feeds in plain] == [["x"]]
    assert plain.provenance == data.provenance
    assert [list(feeds) for feeds in open_data(data, X)] == [["x"]]
    assert open_labelled(data, X) is data


def test_labels_may_be_a_column_or_single_and_inputs_may_be_called_y(tmp_path):
    np.savez(tmp_path / "1.npz", x=rows(2), y=np.array([[3], [4]]))
    np.savez(tmp_path / "2.npz", x=rows(1)[0], y=5)
    np.savez(tmp_path / "3.npz", x=rows(1)[0], y=6)
    assert labels_of(open_labelled(tmp_path, X)) == [[3, 4], [5, 6]]
    inputs = (InputSpec("y", "float32", ("N", 3)),)
    assert labels_of(open_labelled({"y": rows(2), "target": np.array([7, 8])}, inputs)) == [[7, 8]]


def test_labels_follow_the_rows_into_fixed_batches():
    data = open_labelled({"x": rows(7), "y": np.arange(7)}, (InputSpec("x", "float32", (3, 3)),))
    assert labels_of(data) == [[0, 1, 2], [3, 4, 5]]
    assert "dropped" in data.provenance["notes"]


def test_all_rows_unless_fewer_are_asked_for():
    source = {"x": rows(700), "y": np.arange(700)}
    assert sum(len(labels) for labels in labels_of(open_labelled(source, X))) == 700
    assert labels_of(open_labelled(source, X, samples=2)) == [[0, 1]]


def test_whole_feeds_have_one_label():
    inputs = (InputSpec("x", "float32", ("N", 3)), InputSpec("limit", "float32", ()))
    feeds = [{"x": rows(4), "limit": 1.0, "label": i} for i in (8, 9)]
    assert labels_of(open_labelled(feeds, inputs)) == [[8], [9]]


@pytest.mark.parametrize(
    ("labels", "shown"),
    [
        (np.eye(4, dtype=np.int64), "int64[4, 4]"),
        (np.zeros(4, np.float32), "float32[4]"),
        (np.arange(3), "int64[3]"),
    ],
)
def test_labels_that_are_none(labels, shown):
    message = refusal({"x": rows(4), "y": labels})
    assert message == f"the arrays: the labels are {shown}: give one integer per row, int64[4]"


def test_data_without_labels_is_refused_with_the_way_out(tmp_path):
    np.savez(tmp_path / "a.npz", x=rows(2))
    assert refusal(tmp_path / "a.npz") == (
        "a.npz has no labels (found x): add integers under one of label, labels, y, target, "
        "or compare with a reference model instead"
    )
    folder = tmp_path / "flat"
    pictures(folder, "a.png", "b.png")
    assert refusal(folder, PIXEL).startswith("flat: images without labels: put them into one sub-folder per")
    assert "images without labels" in refusal(folder / "a.png", PIXEL)
    with pytest.raises(DataError, match="opened without labels"):
        open_labelled(open_data(rows(2), X), X)


def test_sub_folders_are_classes_in_sorted_order_even_empty_ones(tmp_path):
    pictures(tmp_path, "dog/10.png", "dog/9.png", "ant/more/1.png", "fox/1.png", "stray.png")
    (tmp_path / "cat").mkdir()
    (tmp_path / ".cache").mkdir()
    data = open_labelled(tmp_path, PIXEL)
    ((feeds, labels),) = data
    assert labels.tolist() == [0, 2, 2, 3]
    assert (feeds["x"].ravel() * 255).round().tolist() == [2, 1, 0, 3]
    notes = data.provenance["notes"]
    assert notes["classes"] == "4 sub-folders, numbered in the order of their names"
    assert notes["ignored files"] == "1 outside the sub-folders"


def test_sub_folders_called_by_numbers_are_those_numbers(tmp_path):
    pictures(tmp_path, "10/a.png", "9/a.png", "007/a.png")
    data = open_labelled(tmp_path, PIXEL)
    ((feeds, labels),) = data
    assert labels.tolist() == [7, 9, 10]
    assert (feeds["x"].ravel() * 255).round().tolist() == [2, 1, 0]
    assert data.provenance["notes"] == {
        "normalisation": "none given: pixels / 255",
        "classes": "3 sub-folders, the labels are their names",
    }
    (tmp_path / "7").mkdir()
    assert "two sub-folders stand for the same class (007, 10, 7, 9)" in refusal(tmp_path, PIXEL)


def test_one_sub_folder_tells_nothing(tmp_path):
    pictures(tmp_path / "val", "a/1.png", "b/1.png")
    message = refusal(tmp_path, PIXEL)
    assert f"{tmp_path.name} has one sub-folder only" in message
    assert f"{tmp_path.name}/val" in message
    assert labels_of(open_labelled(tmp_path / "val", PIXEL)) == [[0, 1]]


def test_arrays_in_sub_folders_take_their_own_labels_first(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    np.savez(tmp_path / "a" / "1.npz", x=rows(2))
    np.savez(tmp_path / "b" / "1.npz", x=rows(2))
    np.savez(tmp_path / "b" / "2.npz", x=rows(2), y=np.array([5, 6]))
    assert labels_of(open_labelled(tmp_path, X)) == [[0, 0], [1, 1], [5, 6]]


def test_arrays_in_one_sub_folder_must_bring_their_labels(tmp_path):
    (tmp_path / "part").mkdir()
    np.savez(tmp_path / "part" / "1.npz", x=rows(2), y=np.array([5, 6]))
    assert labels_of(open_labelled(tmp_path, X)) == [[5, 6]]
    np.savez(tmp_path / "part" / "1.npz", x=rows(2))
    assert "1.npz has no labels" in refusal(tmp_path)


def split_rows(data, every, **options):
    return [np.concatenate([feeds["x"][:, 0] for feeds in part]).tolist() for part in split(data, every, **options)]


def test_every_eighth_row_is_held_out():
    data = open_data(rows(20), X, batch=6)
    calibration, held_out = split(data)
    assert [feeds["x"][:, 0].tolist() for feeds in held_out] == [[7 * 3], [15 * 3]]
    assert [len(feeds["x"]) for feeds in calibration] == [6, 5, 5, 2]
    assert calibration.provenance["split"] == {"part": "calibration", "every": 8, "unit": "row"}
    assert held_out.provenance["split"] == {"part": "held out", "every": 8, "unit": "row"}
    assert held_out.provenance["overlap"] is False
    assert isinstance(held_out, Dataset)


@settings(deadline=None)
@given(count=st.integers(1, 150), every=st.integers(2, 20), batch=st.integers(1, 70))
def test_a_split_is_a_partition_in_order(count, every, batch):
    calibration, held_out = split_rows(open_data(rows(count), X, batch=batch), every)
    everything = [float(3 * i) for i in range(count)]
    if count < every:
        assert calibration == held_out == everything
    else:
        assert held_out == everything[every - 1 :: every]
        assert sorted(calibration + held_out) == everything
        assert calibration == sorted(calibration)


def test_batches_of_a_fixed_size_are_never_cut():
    data = open_data(rows(12), (InputSpec("x", "float32", (3, 3)),))
    calibration, held_out = split(data, 2)
    assert [feeds["x"][:, 0].tolist() for feeds in held_out] == [[9, 12, 15], [27, 30, 33]]
    assert [len(feeds["x"]) for feeds in calibration] == [3, 3]
    assert held_out.provenance["split"]["unit"] == "batch"


def test_the_unit_can_be_asked_for():
    data = open_data(rows(12), X, batch=3)
    assert split_rows(data, 2, unit="batch")[1] == [9, 12, 15, 27, 30, 33]


def test_too_few_rows_overlap_and_say_so():
    calibration, held_out = split(open_data(rows(7), X), 8)
    for part in (calibration, held_out):
        assert part.provenance["overlap"] is True
        assert [len(feeds["x"]) for feeds in part] == [7]
    assert split(open_data(rows(8), X), 8)[1].provenance["overlap"] is False


def test_splitting_reads_no_further_than_it_must():
    read = []

    def make():
        for i in range(100):
            read.append(i)
            yield {"x": rows(4)}

    split(open_data(make, X), 8)
    assert read == [0, 1]


def test_a_part_is_a_dataset_of_ours():
    part = split(open_data(rows(20), X))[0]
    assert open_data(part, X) is part


def test_every_must_leave_something():
    with pytest.raises(UsageError, match="at least 2, not 1"):
        split(open_data(rows(20), X), 1)
