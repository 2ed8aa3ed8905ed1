import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights

from onnxq.passes import NormToConv, apply

STATISTICS = {
    "gamma": weights(3, seed=1),
    "beta": weights(3, seed=2),
    "mean": weights(3, seed=3),
    "var": weights(3, seed=4, low=0.5, high=2.0),
}
INPUTS = "float[3] gamma, float[3] beta, float[3] mean, float[3] var"
NORM = "BatchNormalization<epsilon = 0.1>"


@pytest.mark.parametrize("shape", [(2, 3, 7), (2, 3, 4, 5), (1, 3, 2, 3, 4)])
def test_a_lone_normalization_becomes_a_depthwise_conv(shape):
    dims = ",".join(["N", "3", *map(str, shape[2:])])
    text = f"g (float[{dims}] x, {INPUTS}) => (float[{dims}] y) {{ y = {NORM}(x, gamma, beta, mean, var) }}"
    m = model(text, **STATISTICS)
    x = {"x": weights(*shape)}
    before = run(m, x)
    assert apply(m, [NormToConv()], x)[0].count == 1
    assert ops(m) == ["Conv"]
    assert m.graph[0].attributes["group"].value == 3
    assert_same_outputs(before, run(m, x))
    assert NormToConv()(m) == 0


def test_without_spatial_axes_it_stays():
    m = model(f"g (float[N,3] x, {INPUTS}) => (float[N,3] y) {{ y = {NORM}(x, gamma, beta, mean, var) }}", **STATISTICS)
    assert NormToConv()(m) == 0
    assert list(NormToConv().refused(m).values()) == ["its input has no spatial axes"]


def test_computed_parameters_are_refused():
    text = f"""
    g (float[N,3,4,4] x, {INPUTS}) => (float[N,3,4,4] y) {{ v = Exp(var) y = {NORM}(x, gamma, beta, mean, v) }}
    """
    m = model(text, **STATISTICS)
    assert NormToConv()(m) == 0
    assert np.char.find(next(iter(NormToConv().refused(m).values())), "not constants") >= 0
