import weakref
from importlib import import_module

import numpy as np
import pytest
from helpers import model, run, weights

from onnxq import graph
from onnxq.calibrate import observe
from onnxq.calibrate.histogram import Histogram
from onnxq.errors import DataError
from onnxq.runtime import Session, SessionConfig

MODULE = import_module("onnxq.calibrate.observe")  # its name in the package is the function's
MLP = """g (float[N,4] x, float[4,5] w, float[5,3] v) => (float[N,3] y) {
    h = MatMul(x, w)
    r = Relu(h)
    y = MatMul(r, v)
}"""
ONE = SessionConfig(threads=1)


def mlp():
    return model(MLP, w=weights(4, 5), v=weights(5, 3))


def batches(*sizes):
    return [{"x": weights(size, 4, seed=index)} for index, size in enumerate(sizes)]


def run_inner(made, feeds, names):
    return run(graph.with_outputs(made, names), feeds)


@pytest.fixture
def runs(monkeypatch):
    """Rows of the arrays fed in every run of an observation."""
    seen = []

    class Spy(Session):
        def run(self, feeds, outputs=None):
            seen.append({name: np.shape(value) for name, value in feeds.items()})
            return super().run(feeds, outputs)

    monkeypatch.setattr(MODULE, "Session", Spy)
    return seen


def test_one_session_lives_at_a_time(monkeypatch):
    """Each may hold a copy of the weights."""
    living, most = weakref.WeakSet(), []

    class Counted(Session):
        def __init__(self, *given):
            super().__init__(*given)
            living.add(self)
            most.append(len(living))

    monkeypatch.setattr(MODULE, "Session", Counted)
    found = observe(mlp(), batches(7, 3), ["h"], ["x", "r"], config=ONE)
    assert most == [1, 1]
    assert found.shapes == {"x": (1, 4), "r": (1, 5)}
    assert (found.rows, found.batch_rows) == (10, 1)


def test_extremes_are_those_of_a_direct_run():
    made, data = mlp(), batches(7, 40, 1)
    found = observe(made, data, ["x", "h", "r", "y"], config=ONE)
    whole = np.concatenate([feeds["x"] for feeds in data])
    wanted = {"x": whole} | run_inner(made, {"x": whole}, ["h", "r", "y"])
    assert list(found.tensors) == ["x", "h", "r", "y"]
    for name, stats in found.tensors.items():
        assert stats.low == pytest.approx(wanted[name].min(), rel=1e-5)
        assert stats.high == pytest.approx(wanted[name].max(), rel=1e-5)
        assert stats.mean_low == pytest.approx(wanted[name].min(axis=1).mean(), rel=1e-5, abs=1e-6)
        assert stats.mean_high == pytest.approx(wanted[name].max(axis=1).mean(), rel=1e-5, abs=1e-6)
        assert stats.count == wanted[name].size
        assert stats.shape == (1, wanted[name].shape[1])  # of the first piece
        assert stats.name == name
    assert (found.rows, found.batch_rows) == (48, 1)


def test_how_the_rows_are_batched_does_not_matter():
    x = weights(48, 4, seed=5)
    parts = [[{"x": x}], [{"x": part} for part in np.split(x, [1, 7, 30])]]
    first, second = (observe(mlp(), data, ["h"], config=ONE).tensors["h"] for data in parts)
    assert (first.low, first.high, first.count) == (second.low, second.high, second.count)
    assert first.mean_low == pytest.approx(second.mean_low, rel=1e-6)
    np.testing.assert_array_equal(first.counts, second.counts)


def test_what_is_not_finite_is_noticed():
    made = model("g (float[N,2] x) => (float[N,2] y) { h = Log(x)  y = Exp(h) }")
    found = observe(made, [{"x": np.float32([[1, 2], [-1, 3]])}], ["x", "h"], config=ONE)
    assert found.tensors["x"].finite
    assert not found.tensors["h"].finite
    assert found.tensors["h"].high == pytest.approx(np.log(3))


@pytest.mark.parametrize(("budget", "most"), [(40 * 3 + 39, 3), (40, 1), (1, 1), (40 * 1000, 32)])
def test_pieces_keep_within_the_budget(monkeypatch, runs, budget, most):
    monkeypatch.setattr(MODULE, "PIECE_BYTES", budget)  # h and r of one row are 40 bytes
    observe(mlp(), batches(10, 70), ["x", "h", "r"], config=ONE)
    rows = [shapes["x"][0] for shapes in runs]
    assert rows[0] == 1
    assert sum(rows) == 80
    assert max(rows) == most


def test_the_budget_holds_for_every_length_of_sequence(monkeypatch, runs):
    made = model("g (float[N,S,4] x, float[4,5] w) => (float[N,S,5] y) { y = MatMul(x, w) }", w=weights(4, 5))
    lengths = (2, 2, 50, 3, 50)
    monkeypatch.setattr(MODULE, "PIECE_BYTES", 20 * 100)  # 100 positions
    data = [{"x": weights(20, length, 4, seed=at)} for at, length in enumerate(lengths)]
    found = observe(made, data, ["y"], config=ONE)
    assert all(shapes["x"][0] * shapes["x"][1] <= 100 for shapes in runs)
    assert sum(shapes["x"][0] for shapes in runs) == found.rows == 100
    assert [shapes["x"][:2] for shapes in runs[:4]] == [(1, 2), (32 - 13, 2), (20, 2), (1, 50)]
    everything = np.concatenate([run(made, feeds)["y"].ravel() for feeds in data])
    stats = found.tensors["y"]
    assert (stats.low, stats.high) == (pytest.approx(everything.min()), pytest.approx(everything.max()))
    assert stats.count == everything.size


def test_the_state_does_not_grow_with_the_rows(monkeypatch):
    made = []

    class Spy(Histogram):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(MODULE, "Histogram", Spy)
    sizes = []
    for count in (1, 30):
        made.clear()
        observe(mlp(), batches(*[16] * count), ["x", "h", "r", "y"], config=ONE)
        sizes.append(sum(getattr(value, "nbytes", 8) for each in made for value in vars(each).values()))
    assert sizes[0] == sizes[1]
    assert len(made) == 4


def test_a_model_with_fixed_rows_gets_whole_batches(runs):
    made = model("g (float[4,3] x, float[3,2] w) => (float[4,2] y) { y = MatMul(x, w) }", w=weights(3, 2))
    data = [{"x": weights(4, 3, seed=seed)} for seed in range(5)]
    done = []
    found = observe(made, data, ["x", "y"], ["y"], config=ONE, progress=done.append)
    assert [shapes["x"] for shapes in runs if shapes] == [(4, 3)] * 6  # once more for the shape
    assert (found.rows, found.batch_rows) == (20, 4)
    assert done == [4, 8, 12, 16, 20]
    assert found.shapes == {"y": (4, 2)}
    whole = np.concatenate([feeds["x"] for feeds in data])
    assert found.tensors["x"].mean_high == pytest.approx(whole.max(axis=1).mean())


GRAMS = """t = Transpose(x)  u = MatMul(t, x)  v = Transpose(z)  a = MatMul(v, z)  b = Add(a, u)"""


@pytest.mark.parametrize("extra", ["", ", float s"])
def test_inputs_whose_first_axes_differ_are_not_cut(runs, extra):
    last = "y = Mul(b, s)" if extra else "y = Neg(b)"
    made = model(f"g (float[N,2] x, float[M,2] z{extra}) => (float[2,2] y) {{ {GRAMS}  {last} }}")
    feeds = {"x": weights(9, 2), "z": weights(5, 2)} | ({"s": np.array(2, np.float32)} if extra else {})
    found = observe(made, [feeds, feeds], ["z", "b"], config=ONE)
    assert [(shapes["x"], shapes["z"]) for shapes in runs] == [((9, 2), (5, 2))] * 2
    assert (found.rows, found.batch_rows) == (2, 1)
    assert found.tensors["b"].high == pytest.approx(run_inner(made, feeds, ["b"])["b"].max(), rel=1e-5)


def test_nothing_but_graph_inputs():
    found = observe(mlp(), batches(40, 3), ["x"], config=ONE)
    assert list(found.tensors) == ["x"]
    assert found.tensors["x"].count == 43 * 4
    assert found.rows == 43


def test_shapes_are_those_of_one_row():
    found = observe(mlp(), batches(5), ["h"], ["x", "h", "y"], config=ONE)
    assert found.shapes == {"x": (1, 4), "h": (1, 5), "y": (1, 3)}
    assert observe(mlp(), batches(5), ["h"], config=ONE).shapes == {}


def test_integer_inputs_may_be_watched():
    made = model("g (int64[N,3] ids) => (float[N,3] y) { f = Cast<to = 1>(ids)  y = Sqrt(f) }")
    found = observe(made, [{"ids": np.int64([[1, 2, 9]])}], ["ids", "f"], config=ONE)
    assert found.tensors["ids"].high == found.tensors["f"].high == 9.0


def test_progress_counts_rows():
    done = []
    observe(mlp(), batches(3, 60, 2), ["h"], config=ONE, progress=done.append)
    assert done == sorted(done)
    assert done[0] == 1
    assert done[-1] == 65


@pytest.mark.parametrize("data", [[], [{"x": np.zeros((0, 4), np.float32)}]])
def test_no_rows_is_an_error(data):
    with pytest.raises(DataError, match="holds no rows"):
        observe(mlp(), data, ["h"], config=ONE)


def test_rows_that_do_not_fit_are_an_error():
    with pytest.raises(DataError, match=r"x \[1, 7\]"):
        observe(mlp(), [{"x": weights(2, 7)}], ["h"], config=ONE)


def test_twice_the_same():
    data = [{"x": weights(64, 4, seed=9)}]
    first, second, other = (observe(mlp(), data, ["h"], config=ONE, seed=seed).tensors["h"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.counts, second.counts)
    assert (first.low, first.mean_high) == (other.low, other.mean_high)
