"""Times of kernels from the runtime's profile."""

import numpy as np
import pytest
from helpers import model, weights

from onnxq import bench
from onnxq.bench.profile import Kernel, _kernels
from onnxq.runtime import SessionConfig

TEXT = """g (float[n,8] x, float[8,4] w) => (float[n,4] y, float[n,8] z) {
    [dense] y = MatMul(x, w) [three] n = Constant<value = int64 {3}>() always = Constant<value = bool {1}>()
    z = Loop(n, always, x) <body = b (int64 i, bool c, float[n,8] h) => (bool d, float[n,8] k) {
        d = Identity(c) [turn] k = Neg(h) }>
}"""


def event(name, took, cat="Node", **args):
    return {"cat": cat, "name": name, "dur": took, "args": args}


def test_kernels_of_several_models_are_found_by_name():
    nets = [model(TEXT, w=weights(8, 4)), model(TEXT.replace("dense", "other"), w=weights(8, 4))]
    first, second = bench.profiles(nets, {"x": weights(2, 8)}, SessionConfig(threads=1, optimize="off"), seconds=0.0)
    assert first["dense"].op_type == second["other"].op_type == "MatMul"
    assert first["turn"].op_type == "Neg"
    assert "dense" not in second
    assert all(np.isfinite(kernel.ms) and kernel.ms >= 0 for kernel in (*first.values(), *second.values()))


def test_a_time_is_the_mean_of_the_faster_half_and_counts_every_turn_of_a_loop():
    events = [event("a_kernel_time", took, op_name="Conv") for took in (900, 10, 13, 400)]
    events += [event("b_kernel_time", took, op_name="Neg") for took in (2, 2, 2, 2, 2, 2, 2, 2, 7, 7, 7, 7)]
    events += [event("a_fence_before", 5, op_name="Conv"), event("model_run_kernel_time", 99, cat="Session")]
    found = _kernels(events, runs=4)
    assert found == {
        "a": Kernel("Conv", pytest.approx(0.0115)),
        "b": Kernel("Neg", pytest.approx(0.002 * 3)),
    }
