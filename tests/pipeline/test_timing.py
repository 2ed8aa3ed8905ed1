"""Latency by layer from the runtime's profile."""

import numpy as np
import pytest
from helpers import model, weights

from onnxq.pipeline import timing
from onnxq.pipeline.calibrated import Calibrated
from onnxq.plan import Precision, Range, place
from onnxq.runtime import SessionConfig
from onnxq.types.mixed import FLOAT

TEXT = """g (float[n,8,24,24] x, float[16,8,3,3] w, float[16] b, float[16,16,3,3] u, float[4,16,1,1] v)
=> (float[n,4,9,20] y) {
    [conv_1] h = Conv(x, w, b) i = Relu(h) [conv_10] j = Conv<strides = [2, 1]>(i, u) k = Relu(j)
    m = MaxPool<kernel_shape = [2, 1]>(k) [conv_2] y = Conv(m, v)
}"""


def calibrated():
    net = model(TEXT, w=weights(16, 8, 3, 3), b=weights(16), u=weights(16, 16, 3, 3), v=weights(4, 16, 1, 1))
    placement = place(net)
    ranges = {name: Range(-4.0, 4.0, "given") for name in placement.tensors}
    return Calibrated(net, placement, {8: ranges}, Precision())


def test_every_layer_has_its_times_and_the_rest_is_constant():
    found, feeds = calibrated(), {"x": weights(1, 8, 24, 24)}
    costs, total = timing.latency_costs(found, [(8, 8), (4, 8), FLOAT], feeds)
    assert list(costs.layers) == ["conv_1", "conv_10", "conv_2"]
    for times in costs.layers.values():
        assert times[(8, 8)] == times[(4, 8)] > 0
        assert times[FLOAT] > 0
    assert costs.layers["conv_10"][FLOAT] > costs.layers["conv_2"][FLOAT]
    assert costs.constant > 0
    assert sum(times[FLOAT] for times in costs.layers.values()) <= total
    assert list(costs.boundary) == [("conv_1", "conv_10"), ("conv_10", "conv_2")]
    first, second = costs.boundary.values()
    assert first > 0
    assert first / second == pytest.approx((16 * 22 * 22) / (16 * 9 * 20))


def test_a_node_belongs_to_the_layer_whose_name_it_carries():
    names = {"conv_1": "conv_1", "h": "conv_1", "/m/Add": "lin", "/m/MatMul": "lin"}
    times = {
        "conv_1_token_3": 1.0, "h_nchwc": 2.0, "fused conv_1": 4.0,
        "conv_10": 8.0, "/m/Add_1": 16.0, "/m/MatMul/MatMulAddFusion/": 32.0,
        "/m/MatMul.bias_dq": 64.0, "other": 128.0, "h_q": 256.0,
    }  # fmt: skip
    assert timing.by_unit(times, names) == {"conv_1": 7.0, "lin": 96.0}


def test_a_profile_tells_the_time_of_every_node():
    found = timing.profile(calibrated().model, {"x": weights(2, 8, 24, 24)}, SessionConfig(threads=1, optimize="off"))
    assert {"conv_1", "conv_10", "conv_2"} <= set(found)
    assert len(found) == 6
    assert all(np.isfinite(time) and time >= 0 for time in found.values())
