"""Attention probabilities on a logarithmic grid, against the formula."""

from dataclasses import replace

import numpy as np
import pytest
from emitting import quantized
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.emit import emit
from onnxq.errors import UnsupportedError
from onnxq.pipeline.verify import kernel_gap
from onnxq.plan.attention import Attention
from onnxq.tune.job import restrict
from onnxq.types import LogGrid, QuantPlan

TEXT = """g (float[N,3,5,7] x, float[N,3,7,4] v) => (float[N,3,5,4] y) {
    [soft] a = Softmax<axis = -1>(x)
    [product] y = MatMul(a, v)
}"""
MASKS = (-1e9, -np.inf, float(np.finfo(np.float32).min))


def plan_of(**log_softmax):
    return QuantPlan("cpu", "", {}, {}, ("product",), {}, log_softmax=log_softmax)


def softmax(x, axis=-1):
    e = np.exp(x.astype(np.float64) - x.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def expected(a, bits, per_octave):
    """(codes, values) of the formula, and where its rounding is no tie within float32."""
    last = 2**bits - 1
    exact = per_octave * np.log2(np.maximum(a, 1e-300)) + last
    codes = np.clip(np.rint(exact), 0, last)
    values = np.where(codes == 0, 0.0, 2.0 ** ((codes - last) / per_octave))
    clear = (np.abs(exact - np.floor(exact) - 0.5) > 1e-4) | (exact < 0)
    return codes, values, clear


def inside(emitted, feeds):
    """Codes and values as the runtime makes them."""
    q = next(node for node in emitted.graph if node.op_type == "QuantizeLinear").outputs[0]
    product = graph.node_names(emitted)["product"]
    names = [q.name, product.inputs[0].name]
    found = run(graph.with_outputs(emitted, names), feeds)
    return [found[name] for name in names]


@settings(max_examples=40, deadline=None)
@given(
    bits=st.integers(2, 8),
    per_octave=st.sampled_from([1, 2]),
    spread=st.floats(0.1, 12.0),
    seed=st.integers(0, 99),
    mask=st.sampled_from((0.0, *MASKS)),
)
def test_codes_and_values_are_those_of_the_formula(bits, per_octave, spread, seed, mask):
    m = model(TEXT)
    x = spread * weights(2, 3, 5, 7, seed=seed)
    x[:, :, :, 4:6] += np.float32(mask)
    feeds = {"x": x, "v": weights(2, 3, 7, 4, seed=seed + 1)}
    emitted = emit(m, plan_of(soft=LogGrid(bits, per_octave)))
    codes, values, clear = expected(softmax(x), bits, per_octave)
    got_codes, got = inside(emitted, feeds)
    assert got_codes.dtype == np.uint8
    np.testing.assert_array_equal(got_codes[clear], codes[clear])
    np.testing.assert_allclose(got[clear], values[clear], rtol=2e-5, atol=1e-37)
    if mask:
        assert not got[..., 4:6].any()
    if clear.all():
        np.testing.assert_allclose(run(emitted, feeds)["y"], values @ feeds["v"], rtol=1e-4, atol=1e-5)


def test_the_error_of_what_is_not_flushed_is_below_a_quarter_octave():
    m, x = model(TEXT), 2 * weights(2, 3, 5, 7)
    for per_octave, limit in ((2, 2**0.25 - 1), (1, 2**0.5 - 1)):
        emitted = emit(m, plan_of(soft=LogGrid(6, per_octave)))
        got, a = inside(emitted, {"x": x, "v": weights(2, 3, 7, 4)})[1], softmax(x)
        assert limit / 2 < np.abs(got / a - 1).max() <= limit + 1e-4


def test_the_lowest_code_is_zero_and_the_one_above_is_not():
    last, x = 3, np.full((1, 3, 5, 7), -200, np.float32)
    x[..., 0], x[..., 1], x[..., 2] = 0.0, np.log(2.0 ** -(last - 1)), np.log(2.0**-last)
    emitted = emit(model(TEXT), plan_of(soft=LogGrid(2, 1)))
    codes, got = inside(emitted, {"x": x, "v": weights(1, 3, 7, 4)})
    np.testing.assert_array_equal(codes[0, 0, 0], [3, 1, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(got[0, 0, 0], [1.0, 0.25, 0, 0, 0, 0, 0], rtol=1e-6)


@pytest.mark.parametrize("bits", [3, 4, 6])
def test_the_optimised_kernels_compute_the_same(bits):
    m = model(TEXT)
    feeds = {"x": 3 * weights(2, 3, 5, 7), "v": weights(2, 3, 7, 4)}
    emitted = emit(m, plan_of(soft=LogGrid(bits)))
    assert_same_outputs(run(emitted, feeds), run(emitted, feeds, optimize="all"))
    assert kernel_gap(emitted, feeds) <= 1
    assert ops(emitted) == ["LogSoftmax", "QuantizeLinear", "DequantizeLinear", "Exp", "ThresholdedRelu", "MatMul"]


def test_other_readers_and_the_axis_stay():
    text = """g (float[2,7,5] x, float[5,4] v) => (float[2,7,4] y, float[2,7,5] a, float[2,7,5] z) {
        [soft] a = Softmax<axis = 1>(x)
        [product] y = MatMul(a, v)
        z = Neg(a)
    }"""
    m, feeds = model(text), {"x": weights(2, 7, 5), "v": weights(5, 4)}
    before, after = run(m, feeds), run(emit(m, plan_of(soft=LogGrid(4))), feeds)
    np.testing.assert_array_equal(after["a"], before["a"])
    np.testing.assert_array_equal(after["z"], before["z"])
    np.testing.assert_allclose(after["y"], expected(softmax(feeds["x"], 1), 4, 2)[1] @ feeds["v"], rtol=1e-5)


def test_wrong_nodes_are_refused():
    m = model(TEXT)
    with pytest.raises(UnsupportedError, match="'product' a logarithmic grid, but it is no Softmax"):
        emit(m, plan_of(product=LogGrid(4)))
    with pytest.raises(UnsupportedError, match="the node 'gone'"):
        emit(m, plan_of(gone=LogGrid(4)))


def test_a_part_takes_its_own_entries():
    plan = replace(plan_of(soft=LogGrid(4), other=LogGrid(4)))
    assert restrict(plan, model(TEXT)).log_softmax == {"soft": LogGrid(4)}


def test_softened_it_is_the_float_model():
    text = TEXT.replace("float[N,3,7,4] v", "float[N,3,7,6] u, float[6,4] w").replace(
        "[product]", "[linear] v = MatMul(u, w) [product]"
    )
    m = model(text, w=weights(6, 4))
    feeds = {"x": weights(2, 3, 5, 7), "u": weights(2, 3, 7, 6)}
    plan, emitted = quantized(m, feeds, attention=Attention(4))
    assert list(plan.log_softmax) == ["soft"]
    assert set(plan.tensors) == {"u", "v"}
    soft = graph.soften(emitted, plan.tensors)
    assert set(soft.activations) == {"u", "v"}
    assert_same_outputs(run(m, feeds), run(soft.model, feeds), rtol=0.1, atol=0.05)
    a = run(graph.with_outputs(soft.model, [graph.node_names(soft.model)["product"].inputs[0].name]), feeds)
    got = next(value for name, value in a.items() if name != "y")
    np.testing.assert_allclose(got, np.where(softmax(feeds["x"]) > 2**-7.25, softmax(feeds["x"]), 0), rtol=1e-5)
