"""Mean and spread of layers, matched."""

from dataclasses import replace

import numpy as np
import pytest
from helpers import model, run, weights
from tuning import EIGHT, TWO, bare_gemm, clipped, job_of, made, mlp, plan_of, residual

from onnxq import graph
from onnxq.emit import weight_codes
from onnxq.plan import Precision
from onnxq.runtime import Session, SessionConfig
from onnxq.tune import TuneMoments
from onnxq.tune.job import quantized
from onnxq.types import LearnedLayer, Tuned

SIMULATE = SessionConfig(simulate=True)


def moments(values, axis):
    rows = np.moveaxis(np.concatenate(values), axis, 0)
    rows = rows.reshape(len(rows), -1).astype(np.float64)
    return rows.mean(axis=1), rows.std(axis=1)


def results(job, tuned, name):
    """(float, quantized) results of the layer `name` before its activation, on the training batches."""
    layer = graph.layer_of(graph.node_names(job.model)[name])
    plain = graph.with_outputs(job.model, [graph.name_of(layer.output)], keep=False)
    emitted = quantized(job, tuned)
    holder = graph.node_names(emitted)[str((layer.bias_add or layer.node).name)]
    inner = graph.name_of(holder.outputs[0])
    session = Session(graph.with_outputs(emitted, [inner], keep=False), SIMULATE)
    axis = 1 if layer.node.op_type == "Conv" else -1
    found = [session.run(job.feeds[batch])[inner] for batch in job.train]
    return moments([next(iter(run(plain, job.floats[b]).values())) for b in job.train], axis), moments(found, axis)


def assert_same_means(job, tuned, name):
    """Up to the rounding of the int32 bias."""
    (mean, spread), (mean_q, _) = results(job, tuned, name)
    data = graph.name_of(graph.layer_of(graph.node_names(job.model)[name]).data)
    half = tuned.plan.tensors[data].scale * np.asarray(tuned.plan.weights[name].scales) / 2
    assert (np.abs(mean_q - mean) <= half + 1e-4 * spread).all()


CASES = {"residual": (residual, (24, 4, 6, 6)), "clip": (clipped, (500, 4, 7, 7)), "mlp": (mlp, (300, 5, 8))}


@pytest.mark.parametrize("case", CASES)
def test_moments_are_those_of_the_float_network(case):
    build, shape = CASES[case]
    job, tuned = made(build(), shape, TWO, batches=4, shrink=0.7)
    after = TuneMoments()(job, tuned)
    nodes = graph.node_names(job.model)
    assert set(after.layers) == set(tuned.plan.weights) == set(job.block.layers)
    far = 0
    for name, layer in after.layers.items():
        (_, spread), (_, spread_q) = results(job, after, name)
        np.testing.assert_allclose(spread_q, spread, rtol=0.01)
        assert_same_means(job, after, name)
        grid = tuned.plan.weights[name]
        np.testing.assert_array_equal(layer.codes, weight_codes(graph.layer_of(nodes[name]), grid))
        factors = np.asarray(after.plan.weights[name].scales) / np.asarray(grid.scales)
        far += int((np.abs(factors - 1) > 0.02).sum())
        assert after.plan.weights[name].axis == grid.axis
    assert far > 3
    assert after.plan.tensors == tuned.plan.tensors


def test_fine_grids_leave_nothing_to_match():
    job, tuned = made(residual(), (24, 4, 6, 6), EIGHT, batches=4)
    after = TuneMoments()(job, tuned)
    for name, layer in after.layers.items():
        factors = np.asarray(after.plan.weights[name].scales) / np.asarray(tuned.plan.weights[name].scales)
        np.testing.assert_allclose(factors, 1, atol=0.005)
        bias = graph.layer_of(graph.node_names(job.model)[name]).bias
        _, (_, spread) = results(job, tuned, name)
        np.testing.assert_allclose((layer.bias - (0 if bias is None else bias)) / spread, 0, atol=0.015)


@pytest.mark.parametrize("reason", ["few values", "single step", "asked for"])
def test_where_only_the_mean_is_moved(reason):
    shape = (1990 // 5 // 3, 5, 8) if reason == "few values" else (140, 5, 8)  # 3 training batches: 1980 or 2100 rows
    precision = replace(TWO, per_channel=reason != "single step")
    job, tuned = made(mlp(), shape, precision, batches=4, shrink=0.7)
    method = TuneMoments(spread=reason != "asked for")
    assert method.name == ("bias correction" if reason == "asked for" else "moments")
    after = method(job, tuned)
    assert after.plan == tuned.plan
    for name in ("a", "b"):
        (_, spread), (_, spread_q) = results(job, after, name)
        assert_same_means(job, after, name)
        assert np.abs(spread_q / spread - 1).max() > 0.02
        assert after.layers[name].bias is not None


def test_enough_values_are_matched_in_spread():
    job, tuned = made(mlp(), (140, 5, 8), TWO, batches=4, shrink=0.7)
    assert TuneMoments()(job, tuned).plan != tuned.plan


def test_a_factor_has_limits():
    """Steps four times too small: the factor stops at 2."""
    job, tuned = made(residual(), (24, 4, 6, 6), EIGHT, batches=4)
    nodes = graph.node_names(job.model)
    codes = weight_codes(graph.layer_of(nodes["a"]), tuned.plan.weights["a"])
    grid = tuned.plan.weights["a"]
    for factor, kept in ((0.25, 2.0), (4.0, 0.5), (0.8, 1.25)):
        wrong = replace(grid, scales=tuple(step * factor for step in grid.scales))
        start = Tuned(replace(tuned.plan, weights={**tuned.plan.weights, "a": wrong}), {"a": LearnedLayer(codes)})
        after = TuneMoments()(job, start)
        factors = np.asarray(after.plan.weights["a"].scales) / np.asarray(wrong.scales)
        np.testing.assert_allclose(factors, kept, rtol=0.02)
        np.testing.assert_array_equal(after.layers["a"].codes, codes)


def test_learned_biases_are_where_it_starts():
    job, tuned = made(mlp(), (140, 5, 8), TWO, batches=4)
    once = TuneMoments()(job, tuned)
    twice = TuneMoments()(job, once)
    for name in once.layers:
        _, (_, spread) = results(job, once, name)
        np.testing.assert_allclose((twice.layers[name].bias - once.layers[name].bias) / spread, 0, atol=0.02)
    shifted = {name: LearnedLayer(layer.codes, layer.bias + 1) for name, layer in once.layers.items()}
    back = TuneMoments(spread=False)(job, Tuned(once.plan, {**once.layers, "b": shifted["b"]}))
    np.testing.assert_allclose(back.layers["b"].bias, once.layers["b"].bias, atol=0.02)


def test_a_matmul_without_a_bias_is_left_alone():
    text = """g (float[n,5,8] x, float[8,12] w, float[12,6] v, float[6] c) => (float[n,5,6] y) {
        [a] h = MatMul(x, w) i = Relu(h) [b] j = MatMul(i, v) y = Add(j, c)
    }"""
    m = model(text, w=weights(8, 12), v=weights(12, 6), c=weights(6))
    job, tuned = made(m, (140, 5, 8), TWO, batches=4)
    assert set(tuned.plan.weights) == {"a", "b"}
    after = TuneMoments()(job, tuned)
    assert set(after.layers) == {"b"}
    assert after.plan.weights["a"] == tuned.plan.weights["a"]


def test_layers_in_float_are_left_alone():
    job, tuned = made(mlp(), (140, 5, 8), TWO, batches=4, keep_float=["a"])
    assert set(tuned.plan.weights) == {"b"}
    assert set(TuneMoments()(job, tuned).layers) == {"b"}
    bare = Tuned(replace(tuned.plan, weights={}))
    assert TuneMoments()(job, bare) is bare


def test_layers_without_a_bias_get_one():
    job, tuned = made(bare_gemm(), (800, 8), TWO, batches=4, shrink=0.7)
    after = TuneMoments()(job, tuned)
    assert_same_means(job, after, "a")
    assert after.layers["a"].bias.shape == (10,)


def test_dead_channels_keep_their_steps():
    w = weights(6, 4, 3, 3)
    w[2] = 0
    text = "g (float[n,4,6,6] x, float[6,4,3,3] w, float[6] b) => (float[n,6,4,4] y) { [a] y = Conv(x, w, b) }"
    m = model(text, w=w, b=weights(6))
    feeds = [{"x": weights(60, 4, 6, 6, seed=seed)} for seed in range(4)]
    tuned = Tuned(plan_of(m, feeds, Precision(weight_bits=4, first_last=4)))
    after = TuneMoments()(job_of(m, feeds), tuned)
    assert after.plan.weights["a"].scales[2] == tuned.plan.weights["a"].scales[2]
    assert after.layers["a"].bias[2] == pytest.approx(weights(6)[2], rel=1e-4)
    assert after.plan.weights["a"].scales[0] != tuned.plan.weights["a"].scales[0]
