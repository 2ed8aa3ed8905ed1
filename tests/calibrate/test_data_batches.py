"""Batches of models with a fixed first axis, and of models without a row axis; every row in its place."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.calibrate.data import open_data
from onnxq.types import InputSpec

X = (InputSpec("x", "float32", ("N", 3)),)


def rows(count, width=3):
    return np.arange(count * width, dtype=np.float32).reshape(count, width)


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


@pytest.mark.parametrize(
    ("first", "second", "by_row"),
    [
        (("N", 3), ("M", 2), True),
        ((None, 3), ("M", 2), True),
        ((2, 3), (2, 2), True),
        (("N", 3), (4, 2), False),
        ((1, 3), (4, 2), False),
        ((1, 3), (), False),
    ],
)
def test_when_the_first_axes_count_rows(first, second, by_row):
    inputs = (InputSpec("a", "float32", first), InputSpec("b", "float32", second))
    shapes = [[dim if isinstance(dim, int) else 4 for dim in shape] for shape in (first, second)]
    feeds = [{"a": np.full(shapes[0], i), "b": np.full(shapes[1], i)} for i in range(2)]
    got = list(open_data(feeds, inputs, batch=3))
    if by_row and isinstance(first[0], int):
        assert [len(b["a"]) for b in got] == [2, 2]
    elif by_row:
        assert [len(b["a"]) for b in got] == [3, 1, 3, 1]
        assert [len(b["b"]) for b in got] == [3, 1, 3, 1]
    else:
        assert [list(b["a"].shape) for b in got] == [shapes[0]] * 2
        assert [list(b["b"].shape) for b in got] == [shapes[1]] * 2


def peak_of(data):
    """Return the most megabytes that reading takes."""
    tracemalloc.start()
    for _ in data:
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / 2**20


@pytest.mark.parametrize("size", ["N", 16])
def test_memory_does_not_grow_with_the_rows(tmp_path, size):
    (tmp_path / "npz").mkdir()
    batch = np.zeros((16, 2**14), np.float32)  # one megabyte
    for i in range(20):
        np.savez(tmp_path / "npz" / f"{i}.npz", x=batch)
    np.save(tmp_path / "a.npy", np.zeros((640, 2**14), np.float32))
    inputs = (InputSpec("x", "float32", (size, 2**14)),)
    assert peak_of(open_data(tmp_path / "npz", inputs)) < 5
    assert 1 < peak_of(open_data(tmp_path / "a.npy", inputs, samples=640, batch=16)) < 12


@settings(deadline=None)
@given(
    counts=st.lists(st.integers(1, 90), min_size=1, max_size=6),
    batch=st.none() | st.integers(1, 100),
    samples=st.integers(1, 300),
)
def test_the_batches_of_a_dynamic_model_are_the_rows(counts, batch, samples):
    feeds = [{"x": rows(count) + 1000 * i} for i, count in enumerate(counts)]
    got = [b["x"] for b in open_data(feeds, X, batch=batch, samples=samples)]
    assert np.array_equal(np.concatenate(got), np.concatenate([f["x"] for f in feeds])[:samples])
    assert max(map(len, got)) <= min(batch or 64, 64)


@settings(deadline=None)
@given(counts=st.lists(st.integers(1, 90), min_size=1, max_size=6), size=st.integers(1, 100))
def test_the_batches_of_a_fixed_model_are_its_full_batches(counts, size):
    feeds = [{"x": rows(count) + 1000 * i} for i, count in enumerate(counts)]
    got = [b["x"] for b in open_data(feeds, (InputSpec("x", "float32", (size, 3)),), batch=7)]
    everything = np.concatenate([f["x"] for f in feeds])
    full = len(everything) // size * size
    assert {len(b) for b in got} == {size}
    if full:
        assert np.array_equal(np.concatenate(got), everything[:full])
    else:
        assert np.array_equal(got[0][: len(everything)], everything)
        assert (got[0][len(everything) :] == everything[-1]).all()


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 3), min_size=1, max_size=20), batch=st.integers(1, 6))
def test_stacked_samples_keep_order_and_length(lengths, batch):
    inputs = (InputSpec("x", "float32", ("N", "S")),)
    feeds = [{"x": np.full(length, i, np.float32)} for i, length in enumerate(lengths)]
    got = [b["x"] for b in open_data(feeds, inputs, batch=batch)]
    assert [row.tolist() for b in got for row in b] == [f["x"].tolist() for f in feeds]
    assert max(map(len, got)) <= batch
