"""Weights and values that are zero, denormal, tiny or huge: scales stay normal floats, and outputs close."""

import importlib

import numpy as np
import onnx
import onnx.numpy_helper
import pytest
from helpers import model, proto, weights

from onnxq import graph
from onnxq.emit.tables import store_table
from onnxq.errors import UnsupportedError
from onnxq.pipeline import quantize
from onnxq.pipeline.run import Checks
from onnxq.runtime import Session, SessionConfig

TEXT = """g (float[n,3,5,5] x, float[4,3,3,3] w, float[4] b, float[36,5] f, float[5] d) => (float[n,5] y) {
    a = Conv(x, w, b) r = Relu(a) c = Flatten(r) y = Gemm(c, f, d)
}"""
CONFIGS = [SessionConfig(threads=1), SessionConfig(threads=1, optimize="off")]


def scaled(array, factor):
    return (array.astype(np.float64) * factor).astype(np.float32)


@pytest.fixture
def errors(tmp_path, monkeypatch):
    """Errors of a small net, by the largest output, whose parts are multiplied; scales are looked at, too."""
    prepare = importlib.import_module("onnxq.pipeline.prepare")
    monkeypatch.setattr(prepare.simplifier, "simplify", lambda given, **_: (given.clone(), None))

    def run(w=1.0, f=1.0, x=1.0, b=None, channel=1.0, inputs=1.0, **changes):
        kernel, matrix = scaled(weights(4, 3, 3, 3), w), scaled(weights(36, 5, seed=3), f)
        kernel[1], matrix[:, 2] = scaled(kernel[1], channel), scaled(matrix[:, 2], inputs)
        bias = scaled(weights(4, seed=5), w * x if b is None else b)
        made = proto(TEXT, w=kernel, b=bias, f=matrix, d=scaled(weights(5, seed=6), w * x * f))
        onnx.save(made, tmp_path / "model.onnx")
        feeds = {"x": scaled(weights(24, 3, 5, 5, seed=1), x)}
        result = quantize(tmp_path / "model.onnx", feeds, checks=Checks(time_it=False), **changes)
        for entry in onnx.ModelProto.FromString(graph.to_bytes(result.model)).graph.initializer:
            if entry.name.endswith("_scale"):
                scale = onnx.numpy_helper.to_array(entry)
                assert (np.finfo(np.float32).tiny <= scale).all(), entry.name
                assert np.isfinite(scale).all(), entry.name
        wanted = Session(tmp_path / "model.onnx", CONFIGS[0]).run(feeds)["y"]
        found = [Session(result.model, config).run(feeds)["y"] for config in CONFIGS]
        assert np.isfinite(wanted).all()
        return max(float(np.abs(y - wanted).max()) for y in found), float(np.abs(wanted).max())

    return run


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize(
    "parts",
    [
        {"w": 1e-30, "f": 1e30},
        {"w": 1e30, "f": 1e-30},
        {"w": 1e30},
        {"x": 1e30},
        {"x": 1e-18, "w": 1e-10},
        {"f": 1e-20},
        {"b": 1e30},
        {"channel": 0.0},
        {"channel": 1e-40, "inputs": 1e-40},
        {"x": 1e-25, "w": 1e-25, "b": 1.0},
    ],
    ids=str,
)
def test_magnitudes_do_not_matter(parts, per_channel, errors):
    error, largest = errors(**parts, per_channel=per_channel)
    assert error < 0.02 * largest


@pytest.mark.parametrize(
    "parts", [{"w": 0.0}, {"f": 0.0}, {"x": 0.0}, {"w": 1e-40}, {"f": 1e-40}, {"x": 1e-40}], ids=str
)
def test_nothing_at_all_stays_nothing(parts, errors):
    error, _ = errors(**parts)
    assert error < 1e-34


def test_products_beyond_float_are_refused(errors):
    with pytest.raises(UnsupportedError, match="so large that products overflow"):
        errors(channel=1e30, inputs=1e30)


def test_rows_of_a_table_keep_their_own_magnitude():
    table = (weights(6, 8) * np.asarray([[1], [1e-9], [1e-20], [0], [1e20], [1e-40]])).astype(np.float32)
    made = model("g (int64[n] i, float[6,8] t) => (float[n,8] e) { [n] e = Gather(t, i) }", t=table)
    store_table(made, next(graph.nodes(made, "Gather")))
    rows = Session(made, CONFIGS[0]).run({"i": np.arange(6)})["e"]
    assert (np.abs(rows - table).max(axis=1) <= 0.005 * np.abs(table).max(axis=1) + 1e-35).all()
