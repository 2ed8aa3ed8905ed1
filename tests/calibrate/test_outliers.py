import numpy as np
import pytest
from helpers import model, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.calibrate import find_outliers, outliers
from onnxq.errors import DataError
from onnxq.runtime import SessionConfig

ONE = SessionConfig(threads=1)
TEXT = """g (float[n,3,6,6] x, float[9,3,3,3] w, float[9,5] v) => (float[n,5] y) {
    h = Conv(x, w) i = Relu(h) p = GlobalAveragePool(i) q = Flatten(p) y = MatMul(q, v)
}"""


def network(loud=(), times=20.0):
    w = weights(9, 3, 3, 3)
    w[list(loud)] *= times
    return model(TEXT, w=w, v=weights(9, 5))


def batches(*sizes, loud=(), times=20.0):
    rows = weights(sum(sizes), 3, 6, 6)
    rows[list(loud)] *= times
    return [{"x": part} for part in np.split(rows, np.cumsum(sizes)[:-1])]


def found(m, data, **tensors):
    return find_outliers(m, data, tensors, config=ONE)


def test_injected_channels_and_samples_are_found():
    result = found(network(loud=(2, 7)), batches(16, 16, 8, loud=(5, 33)), x=1, h=1, y=-1)
    assert {one.index for one in result["h"].channels} == {2, 7}
    assert {one.index for one in result["h"].samples} == {5, 33}
    assert {one.index for one in result["x"].samples} == {5, 33}
    assert result["x"].channels == ()  # a loud sample makes no channel loud
    assert result["h"].count == 9
    assert result["y"].count == 5
    quiet = found(network(), batches(40), x=1, h=1, y=-1)
    assert all(one.channels == one.samples == () for one in quiet.values())


def test_figures_by_hand():
    m, data = network(loud=(4,)), batches(10, 7, loud=(12,), times=30)
    result = found(m, data, h=1)["h"]
    values = np.abs(run(graph.with_outputs(m, ["h"]), {"x": np.concatenate([part["x"] for part in data])})["h"])
    peaks = values.max(axis=(2, 3))
    channels, samples = np.median(peaks, axis=0), peaks.max(axis=1)
    for (one,), magnitudes in ((result.channels, channels), (result.samples, samples)):
        heights = np.log2(magnitudes)
        middle = np.median(heights)
        deviation = np.median(np.abs(heights - middle))
        assert one.magnitude == pytest.approx(magnitudes[one.index], rel=1e-4)
        assert one.times == pytest.approx(2 ** (heights[one.index] - middle), rel=1e-4)
        assert one.score == pytest.approx(0.6745 * (heights[one.index] - middle) / max(deviation, 0.125), rel=1e-4)
    assert result.samples[0].index == 12
    assert result.channels[0].index == 4


def test_the_most_extreme_comes_first():
    w = weights(9, 3, 3, 3)
    w[1], w[6] = w[1] * 15, w[6] * 60
    m = model(TEXT, w=w, v=weights(9, 5))
    assert [one.index for one in found(m, batches(9), h=1)["h"].channels] == [6, 1]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(0.5, 2), min_size=5, max_size=30), st.floats(1e-3, 1e3), st.integers(0, 4))
def test_only_what_is_several_times_the_others_stands_out(others, scale, where):
    magnitudes = scale * np.asarray(others)
    assert outliers._extreme(np.arange(len(others)), magnitudes) == ()
    magnitudes[where] = 200 * scale
    loud = outliers._extreme(np.arange(len(others)), magnitudes)
    spread = np.median(np.abs(np.log2(magnitudes) - np.median(np.log2(magnitudes))))
    if spread < 0.8:
        assert [one.index for one in loud] == [where]
    assert all(one.index == where for one in loud)


def test_alike_channels_do_not_make_a_small_difference_an_outlier():
    assert outliers._extreme(np.arange(4), np.asarray([1.0, 1.0, 1.0, 3.9])) == ()
    (one,) = outliers._extreme(np.arange(4), np.asarray([1.0, 1.0, 1.0, 4.1]))
    assert one.index == 3
    assert one.score == pytest.approx(0.6745 * np.log2(4.1) / 0.125)


def test_dead_channels_and_values_that_are_not_finite():
    w = weights(9, 3, 3, 3)
    w[3] *= 20
    w[[0, 1, 2, 4, 5]] = 0
    m = model(TEXT, w=w, v=weights(9, 5))
    assert [one.index for one in found(m, batches(9), h=1)["h"].channels] == [3]
    data = batches(9)
    data[0]["x"][4, 0, 0, 0] = np.inf
    data[0]["x"][5, 0, 0, 0] = np.nan
    assert found(m, data, x=1)["x"].samples == ()
    zeros = [{"x": np.zeros((3, 3, 6, 6), np.float32)}]
    assert found(m, zeros, x=1, h=1)["h"] == outliers.TensorOutliers((), (), 9)


def test_tensors_without_samples_and_the_first_samples_only(monkeypatch):
    m = model(
        """g (float[n,4] x, float[4,6] w) => (float[6,4] u) {
            h = MatMul(x, w) t = Transpose<perm = [1, 0]>(h) u = MatMul(t, x)
        }""",
        w=weights(4, 6) * np.asarray([1, 1, 1, 50, 1, 1], np.float32),
    )
    data = [{"x": weights(9, 4, seed=seed)} for seed in range(3)]
    result = found(m, data, t=0, h=1)
    assert [one.index for one in result["t"].channels] == [one.index for one in result["h"].channels] == [3]
    assert result["t"].samples == ()
    square = found(m, [{"x": weights(6, 4)}], u=0)["u"]  # as many channels as samples
    assert [one.index for one in square.channels] == [3]
    assert square.samples == ()
    monkeypatch.setattr(outliers, "KEPT_SAMPLES", 9)
    louder = [data[0], *({"x": 100 * part["x"]} for part in data[1:])]
    assert found(m, louder, h=1)["h"].channels == found(m, data[:1], h=1)["h"].channels


def test_progress_and_empty_data():
    done = []
    find_outliers(network(), batches(3, 4), {"h": 1}, config=ONE, progress=done.append)
    assert done == [3, 7]
    find_outliers(network(), batches(20), {"h": 1}, config=ONE, progress=done.append)
    assert done[2:] == [8, 16, 20]
    with pytest.raises(DataError, match="holds no rows"):
        found(network(), [], h=1)
