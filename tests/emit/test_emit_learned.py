"""Codes and biases that were learned, in place of plain rounding."""

from dataclasses import replace

import numpy as np
import pytest
from emitting import kernels, quantized, sqnr, stored
from helpers import model, weights

from onnxq import graph
from onnxq.emit import emit, weight_codes
from onnxq.errors import UnsupportedError
from onnxq.pipeline.verify import kernel_gap
from onnxq.types import LearnedLayer

LAYERS = {
    "conv": ("Conv(x, w, b)", (2, 4, 6, 6), (6, 4, 3, 3), (2, 6, 4, 4), 0),
    "conv without a bias": ("Conv(x, w)", (2, 4, 6, 6), (6, 4, 3, 3), (2, 6, 4, 4), 0),
    "gemm": ("Gemm<transB = 1>(x, w, b)", (5, 4), (6, 4), (5, 6), 0),
    "gemm without a bias": ("Gemm(x, w)", (5, 4), (4, 6), (5, 6), 1),
    "matmul": ("MatMul(x, w) y = Add(b, h)", (5, 4), (4, 6), (5, 6), 1),
}


def built(case):
    body, x, w, y, axis = LAYERS[case]
    dims = [",".join(map(str, shape)) for shape in (x, w, y)]
    constants = {"w": weights(*w)}
    inputs = f"float[{dims[0]}] x, float[{dims[1]}] w"
    if "b" in body.split("(", 1)[1].replace("transB", ""):
        inputs, constants["b"] = f"{inputs}, float[6] b", weights(6)
    head = "h" if case == "matmul" else "y"
    m = model(f"g ({inputs}) => (float[{dims[2]}] y) {{ [n] {head} = {body} }}", **constants)
    return m, {"x": weights(*x, seed=5)}, axis


@pytest.mark.parametrize("case", LAYERS)
def test_learned_codes_and_biases_are_stored(case):
    m, feeds, axis = built(case)
    plan, _ = quantized(m, feeds)
    grid = plan.weights["n"]
    layer = graph.layer_of(graph.node_names(m)["n"])
    moves = np.random.default_rng(0).integers(-8, 9, layer.weight.shape)
    codes = np.clip(weight_codes(layer, grid) + moves, -127, 127).astype(np.int8)
    bias = (0 if layer.bias is None else layer.bias) + 0.2 * weights(6, seed=9)
    before = graph.to_bytes(m)
    made = emit(m, plan, learned={"n": LearnedLayer(codes, bias)})
    assert graph.to_bytes(m) == before
    np.testing.assert_array_equal(stored(made, "n.weight_q"), codes)
    step = np.float32(plan.tensors["x"].scale) * np.asarray(grid.scales, np.float32)
    np.testing.assert_array_equal(stored(made, "n.bias_q"), np.rint(bias.astype(np.float64) / step))
    shape = [-1 if i == axis else 1 for i in range(layer.weight.ndim)]
    graph.replace_constant(m, layer.node, 1, (codes * np.asarray(grid.scales).reshape(shape)).astype(np.float32))
    if layer.bias_add is not None:
        graph.replace_constant(m, layer.bias_add, 0, bias)
    else:
        graph.replace_constant(m, layer.node, 2, bias, "b")
    assert sqnr(m, made, feeds) > 30
    assert kernel_gap(made, feeds) <= 1
    assert not {"Conv", "Gemm", "MatMul"} & set(kernels(made))


@pytest.mark.parametrize("case", LAYERS)
def test_plain_codes_and_no_bias_change_nothing(case):
    m, feeds, _ = built(case)
    plan, made = quantized(m, feeds)
    codes = weight_codes(graph.layer_of(graph.node_names(m)["n"]), plan.weights["n"])
    assert codes.dtype == np.int8
    for learned in (None, {}, {"n": LearnedLayer(codes)}, {"other": LearnedLayer(codes)}):
        assert graph.to_bytes(emit(m, plan, learned=learned)) == graph.to_bytes(made)


def test_a_learned_bias_needs_an_add():
    m = model("g (float[5,4] x, float[4,6] w) => (float[5,6] y) { [n] y = MatMul(x, w) }", w=weights(4, 6))
    plan, _ = quantized(m, {"x": weights(5, 4)})
    codes = np.ones((4, 6), np.int8)
    with pytest.raises(UnsupportedError, match="no Add to hold it"):
        emit(m, plan, learned={"n": LearnedLayer(codes, weights(6))})
    np.testing.assert_array_equal(stored(emit(m, plan, learned={"n": LearnedLayer(codes)}), "n.weight_q"), codes)


def test_learned_codes_must_fit():
    m, feeds, _ = built("gemm")
    plan, _ = quantized(m, feeds)
    with pytest.raises(UnsupportedError, match=r"codes of shape \[4, 6\] were learned for 'n'"):
        emit(m, plan, learned={"n": LearnedLayer(np.ones((4, 6), np.int8))})


def test_constants_that_no_integer_node_reads_stay():
    """As in a part of the model for which the plan was made."""
    text = """g (float[2,4,6,6] x, float[6,4,3,3] w, float[6,1,1] k, float[3,6,1,1] v) => (float[2,3,4,4] y) {
        [a] h = Conv(x, w) i = Mul(h, k) [b] y = Conv(i, v)
    }"""
    m = model(text, w=weights(6, 4, 3, 3), k=weights(6, 1, 1), v=weights(3, 6, 1, 1))
    plan, whole = quantized(m, {"x": weights(2, 4, 6, 6)})
    assert "k_q" in graph.value_map(whole)
    node = next(name for name in plan.integer if name not in ("a", "b"))
    part = emit(m, replace(plan, integer=tuple(name for name in plan.integer if name != node)))
    assert "k_q" not in graph.value_map(part)
