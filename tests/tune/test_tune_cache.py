"""Activations in memory and on disk."""

import tempfile
from pathlib import Path

import numpy as np
import pytest

from onnxq.tune.cache import Cache, View


@pytest.fixture
def scratch(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def files(folder):
    return [path for path in Path(folder).rglob("*") if path.is_file()]


def test_what_exceeds_the_budget_goes_to_files_that_are_removed(scratch):
    arrays = [np.full((10, 10), index, np.float32) for index in range(4)]
    with Cache(1000) as cache:
        for index, array in enumerate(arrays):
            cache.put("x", index, array)
        assert cache.on_disk == len(files(scratch)) == 2
        for index, array in enumerate(arrays):
            np.testing.assert_array_equal(cache.get("x", index), array)
            assert cache.get("x", index).dtype == np.float32
        cache.drop("x", 3)
        assert cache.on_disk == len(files(scratch)) == 1
        cache.drop("x", 0)
        cache.put("y", 0, arrays[1])  # there is room in memory again
        assert cache.on_disk == 1
        cache.put("x", 2, arrays[0])
        np.testing.assert_array_equal(cache.get("x", 2), arrays[0])
        assert len(files(scratch)) == 1
        cache.drop("nothing", 7)
        with pytest.raises(KeyError):
            cache.get("x", 3)
    assert not list(scratch.iterdir())


def test_replacing_an_array_frees_its_room(scratch):
    with Cache(800) as cache:
        for _ in range(5):
            cache.put("x", 0, np.zeros((10, 20), np.float32))
        assert cache.on_disk == 0


def test_files_go_when_something_fails(scratch):
    def fail():
        with Cache(0) as cache:
            cache.put("x", 0, np.zeros(3))
            assert len(files(scratch)) == 1
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert not list(scratch.iterdir())


def test_a_view_reads_feeds_under_other_names():
    with Cache() as cache:
        for batch in range(3):
            cache.put("float:a", batch, np.asarray([batch]))
            cache.put("float:b", batch, np.asarray([10 * batch]))
        view = View(cache, {"a": "float:a", "b": "float:b"}, 3)
        assert len(view) == 3
        assert [(feeds["a"][0], feeds["b"][0]) for feeds in view] == [(0, 0), (1, 10), (2, 20)]
        assert view[2]["b"][0] == 20
        with pytest.raises(IndexError):
            view[3]
