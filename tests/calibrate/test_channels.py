import numpy as np
import pytest
from helpers import model, run, weights

from onnxq import graph
from onnxq.calibrate.channels import channel_ranges
from onnxq.errors import DataError
from onnxq.runtime import SessionConfig

TEXT = """g (float[N,3,5] x, float[5,4] w) => (float[N,3,4] y) {
    h = MatMul(x, w)
    y = Relu(h)
}"""
ONE = SessionConfig(threads=1)


def mlp(text=TEXT):
    return model(text, w=weights(5, 4))


def batches(*sizes):
    return [{"x": weights(size, 3, 5, seed=index) * (index + 1)} for index, size in enumerate(sizes)]


def whole(m, data, name):
    x = np.concatenate([feeds["x"] for feeds in data])
    return x if name == "x" else run(graph.with_outputs(m, [name]), {"x": x})[name]


def test_extremes_along_any_axis_are_those_of_a_direct_run():
    m, data = mlp(), batches(7, 20, 1)
    done = []
    found = channel_ranges(m, data, {"x": 1, "h": -1, "y": 2}, config=ONE, progress=done.append)
    assert list(found) == ["x", "h", "y"]
    for name, others in (("x", (0, 2)), ("h", (0, 1)), ("y", (0, 1))):
        values = whole(m, data, name)
        np.testing.assert_allclose(found[name].low, values.min(others), rtol=1e-5)
        np.testing.assert_allclose(found[name].high, values.max(others), rtol=1e-5)
        assert found[name].count == 28 * (5 if name == "x" else 3)
        assert found[name].finite
    assert done == [1, 7, 27, 28]  # the first row tells how many fit into memory


def test_everything_is_sampled_while_it_fits():
    m, data = mlp(), batches(4, 3)
    found = channel_ranges(m, data, {"h": -1}, config=ONE)["h"]
    rows = whole(m, data, "h").reshape(-1, 4)
    order = np.lexsort(found.sample.T), np.lexsort(rows.T)
    np.testing.assert_allclose(found.sample[order[0]], rows[order[1]], rtol=1e-5)


def test_the_sample_is_bounded_even_and_repeatable():
    m = mlp()
    data = [{"x": np.full((10, 3, 5), index, np.float32)} for index in range(40)]
    found = channel_ranges(m, data, {"x": -1}, keep=200, config=ONE)["x"]
    assert found.sample.shape == (200, 5)
    assert found.count == 1200
    counts = np.bincount(found.sample[:, 0].astype(int), minlength=40)
    assert counts.max() <= 15  # 5 each on average
    assert 80 <= counts[:20].sum() <= 120
    again = channel_ranges(m, data, {"x": -1}, keep=200, config=ONE)["x"]
    np.testing.assert_array_equal(found.sample, again.sample)
    other = channel_ranges(m, data, {"x": -1}, keep=200, config=ONE, seed=1)["x"]
    assert not np.array_equal(found.sample, other.sample)


def test_rows_with_infinities_are_left_out_and_told():
    data = batches(3)
    data[0]["x"][1, 2, 3] = np.inf
    found = channel_ranges(mlp(), data, {"x": -1}, config=ONE)["x"]
    assert not found.finite
    assert found.count == 8
    assert np.isfinite(found.high).all()
    data[0]["x"][:] = np.nan
    found = channel_ranges(mlp(), data, {"x": -1}, config=ONE)["x"]
    assert (found.count, found.finite, found.sample.shape) == (0, False, (0, 5))
    np.testing.assert_array_equal(found.low, np.zeros(5))


def test_a_fixed_first_axis_is_fed_whole():
    m = mlp(TEXT.replace("N", "20"))
    data = batches(20, 20)
    found = channel_ranges(m, data, {"h": -1}, config=ONE)["h"]
    both = np.concatenate([run(graph.with_outputs(m, ["h"]), feeds)["h"] for feeds in data])
    np.testing.assert_allclose(found.high, both.max((0, 1)), rtol=1e-5)


def test_no_rows_are_an_error():
    with pytest.raises(DataError, match="holds no rows"):
        channel_ranges(mlp(), [], {"h": -1}, config=ONE)


def test_channels_in_the_middle_of_four_axes():
    m = model("g (float[N,3,2,5] x) => (float[N,3,2,5] y) { y = Relu(x) }")
    x = weights(4, 3, 2, 5)
    found = channel_ranges(m, [{"x": x}], {"x": 1}, config=ONE)["x"]
    np.testing.assert_array_equal(found.low, x.min((0, 2, 3)))
    np.testing.assert_array_equal(found.high, x.max((0, 2, 3)))


def test_rows_of_small_pieces_are_drawn_no_more_often():
    m = mlp()
    x = np.zeros((10, 3, 5), np.float32)
    x[8:] = 1.0  # these two rows are a piece of their own
    drawn = [
        channel_ranges(m, [{"x": x}] * 5, {"x": -1}, keep=6, config=ONE, seed=seed)["x"].sample[:, 0].mean()
        for seed in range(10)
    ]
    assert 0.05 <= np.mean(drawn) <= 0.4
