"""MatMuls with float results, written as the runtime's own operator."""

from dataclasses import replace

import numpy as np
import pytest
from emitting import EIGHT, kernels, quantized, sqnr, stored
from helpers import model, run, weights

from onnxq import graph
from onnxq.emit import emit, products, weight_codes, weight_grid
from onnxq.errors import UnsupportedError
from onnxq.pipeline import inspect
from onnxq.plan import Precision
from onnxq.types import LearnedLayer

BIASED = """g (float[n,t,5] x, float[5,7] w, float[7] b) => (float[n,t,7] y) {
    [p] h = MatMul(x, w) [s] y = Add(h, b)
}"""
BARE = """g (float[n,t,5] x, float[5,7] w) => (float[n,t,7] y) { [p] y = MatMul(x, w) }"""
LOUD = """g (float[n,t,5] x, float[5,7] w, float[7] b) => (float[n,t,7] y) {
    [p] h = MatMul(x, w) [s] s = Add(b, h) [e] e = Erf(s) [m] y = Mul(s, e)
}"""
CHAIN = """g (float[n,5] x, float[5,7] w, float[7] b, float[7,3] v) => (float[n,3] y) {
    [p] h = MatMul(x, w) [s] s = Add(h, b) [r] r = Relu(s) [q] y = MatMul(r, v)
}"""
X = weights(2, 3, 5, seed=9)
CONSTANTS = {"w": weights(5, 7, seed=1) * np.geomspace(0.01, 10, 7, dtype=np.float32), "b": weights(7, seed=2)}


def made(text):
    return model(text, **{name: array for name, array in CONSTANTS.items() if f" {name}" in text})


def both(text, precision=EIGHT, learned=None):
    """(float model, its plan, with pairs, with the operator)."""
    m = made(text)
    plan, _ = quantized(m, {"x": X}, precision)
    paired, written = (emit(m, plan, learned=learned, fused=fused) for fused in (False, True))
    return m, plan, paired, written


@pytest.mark.parametrize("text", [BIASED, BARE, LOUD], ids=["biased", "bare", "read twice"])
def test_a_float_result_is_one_node_in_every_session(text):
    m, _, paired, written = both(text)
    (node,) = products(written)
    assert node.name == "p"
    assert len(node.inputs) == (5 if text is BARE else 7)
    assert len(weight_grid(node)) == 1
    assert "Add" not in kernels(written)
    assert "DequantizeLinear" not in kernels(written)
    wanted, got, plain = (run(made_, {"x": X}, optimize=level)["y"] for made_, level in
                          ((paired, "all"), (written, "all"), (written, "off")))  # fmt: skip
    np.testing.assert_array_equal(got, plain)  # no optimiser is needed
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
    assert sqnr(m, written, {"x": X}) > 35


def test_the_bias_is_exact():
    _, plan, _, written = both(BIASED)
    np.testing.assert_array_equal(stored(written, "p.bias"), CONSTANTS["b"])
    zero = run(written, {"x": np.full_like(X, 0.0)})["y"]
    np.testing.assert_allclose(zero, np.broadcast_to(CONSTANTS["b"], zero.shape), rtol=1e-6)
    assert plan.weights["p"].axis == 1


def reference(plan, codes, bias):
    """The layer's result with numpy alone: no bias is rounded."""
    grid = plan.tensors["x"]
    last = 2**grid.bits - 1
    rounded = np.clip(np.rint(X / np.float32(grid.scale)) + grid.zero_point, 0, last) - grid.zero_point
    return (rounded * grid.scale) @ (codes * np.asarray(plan.weights["p"].scales)) + bias


def test_a_learned_bias_and_learned_codes_are_written():
    m = made(BIASED)
    plan, _ = quantized(m, {"x": X})
    codes = np.full((5, 7), 3, np.int8)
    written = emit(m, plan, learned={"p": LearnedLayer(codes, np.arange(7, dtype=np.float32))}, fused=True)
    np.testing.assert_array_equal(stored(written, "p.bias"), np.arange(7))
    expected = reference(plan, codes, np.arange(7))
    np.testing.assert_allclose(run(written, {"x": X})["y"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", [Precision(3, 3, first_last=3), Precision(3), Precision(per_channel=False)])
def test_few_bits_and_a_single_step(precision):
    m, plan, _, written = both(BIASED, precision)
    codes = weight_codes(graph.layer_of(graph.node_names(m)["p"]), plan.weights["p"])
    got = run(written, {"x": X}, optimize="all")["y"]
    np.testing.assert_allclose(got, reference(plan, codes, CONSTANTS["b"]), rtol=1e-5, atol=1e-5)
    (steps,) = weight_grid(next(iter(products(written))))
    np.testing.assert_array_equal(graph.constant(steps).reshape(-1), np.float32(plan.weights["p"].scales))
    packed = run(emit(m, plan, packed=True, fused=True), {"x": X}, optimize="all")["y"]
    np.testing.assert_array_equal(packed, got)


def test_what_is_rounded_behind_it_keeps_its_pairs():
    m = model(CHAIN, **CONSTANTS, v=weights(7, 3, seed=4))
    feeds = {"x": weights(6, 5, seed=9)}
    plan, _ = quantized(m, feeds)
    assert "r" in plan.tensors
    written = emit(m, plan, fused=True)
    assert [node.name for node in products(written)] == ["q"]
    assert sqnr(m, written, feeds) > 30


def test_other_targets_and_other_codes_keep_theirs():
    m = made(BIASED)
    plan, _ = quantized(m, {"x": X})
    web = emit(m, replace(plan, target="web"), fused=True)
    assert not list(products(web))
    wide = replace(plan, tensors={"x": replace(plan.tensors["x"], bits=16, zero_point=30000)})
    assert not list(products(emit(m, wide, fused=True)))


def test_a_learned_bias_needs_an_add():
    m = made(BARE)
    plan, _ = quantized(m, {"x": X})
    learned = {"p": LearnedLayer(np.ones((5, 7), np.int8), np.ones(7, np.float32))}
    for fused in (False, True):
        with pytest.raises(UnsupportedError, match="a bias was learned for 'p', which has no Add"):
            emit(m, plan, learned=learned, fused=fused)


def test_inspection_reads_products(tmp_path):
    """Also one that somebody else wrote, without zero points, and where nothing else is quantized."""
    _, _, _, written = both(BIASED)
    path = tmp_path / "q.onnx"
    graph.save(written, path)
    found = inspect(path, blocks=True)
    assert found.coverage.integer_macs == found.coverage.total_macs > 0
    assert found.blocks == ()
    (layer,) = found.layers
    assert (layer.name, layer.op_type, layer.weight_bits, layer.weight_scales) == ("p", "MatMulIntegerToFloat", 8, 7)
    assert (layer.input_dtype, layer.input_zero_point) == ("uint8", stored(written, "x_zero_point"))
    (node,) = products(written)
    node.resize_inputs(4)
    graph.save(written, path)
    (layer,) = inspect(path).layers
    assert (layer.input_dtype, layer.input_zero_point) == ("uint8", 0)


def test_a_product_of_matrices_is_a_gemm_already():
    """With its bias; the runtime's kernel for it is as fast, and pairs are known everywhere."""
    m = made(BIASED.replace("n,t,", "n,"))
    plan, paired = quantized(m, {"x": X[0]})
    written = emit(m, plan, fused=True)
    assert not list(products(written))
    assert kernels(written) == ["QuantizeLinear", "QGemm"]
    assert graph.to_bytes(written) == graph.to_bytes(paired)


SHARED = """g (float[n,t,5] x, float[5,7] w, float[7] b, float[5,7] v) => (float[n,t,7] y, float[n,t,7] z) {
    [p] h = MatMul(x, w) [s] y = Add(h, b) [q] z = MatMul(x, v)
}"""


def of_run(array):
    """The grid that DynamicQuantizeLinear gives, and what it makes of `array`."""
    low, high = min(array.min(), 0), max(array.max(), 0)
    scale = np.float32((high - low) / 255)
    zero = np.rint(np.clip(-low / scale, 0, 255))
    return (np.clip(np.rint(array / scale) + zero, 0, 255) - zero) * scale


@pytest.mark.parametrize("text", [BIASED, BARE, LOUD, SHARED], ids=["biased", "bare", "read twice", "shared"])
def test_a_tensor_rounded_in_every_run_has_the_grid_of_that_run(text):
    m = model(text, **{name: array for name, array in (CONSTANTS | {"v": weights(5, 7, seed=4)}).items()
                       if f" {name}" in text})  # fmt: skip
    plan, _ = quantized(m, {"x": X})
    written = emit(m, replace(plan, dynamic=("x",)), fused=True)
    (rounding,) = graph.nodes(written, "DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear")
    assert rounding.op_type == "DynamicQuantizeLinear"
    for factor in (1.0, 50.0):  # far outside of the plan's grid, too
        feeds = {"x": X * np.float32(factor)}
        got = run(written, feeds, optimize="all")
        wanted = run(_plain(m, plan), {"x": of_run(feeds["x"]).astype(np.float32)})
        for name, array in wanted.items():
            np.testing.assert_allclose(got[name], array, rtol=1e-4, atol=2e-4 * np.abs(array).max())


def _plain(m, plan):
    """The float model with its weights rounded."""
    rounded = m.clone()
    for name, grid in plan.weights.items():
        node = graph.node_names(rounded)[name]
        layer = graph.layer_of(node)
        codes = weight_codes(layer, grid).astype(np.float32)
        graph.replace_constant(rounded, node, 1, codes * np.asarray(grid.scales, np.float32))
    return rounded


def test_pairs_keep_the_fixed_grid():
    m, plan, paired, _ = both(BIASED)
    assert graph.to_bytes(emit(m, replace(plan, dynamic=("x",)))) == graph.to_bytes(paired)


def test_inspection_knows_the_grid_of_a_run(tmp_path):
    m, plan, _, _ = both(BIASED)
    graph.save(emit(m, replace(plan, dynamic=("x",)), fused=True), tmp_path / "q.onnx")
    found = inspect(tmp_path / "q.onnx")
    (layer,) = found.layers
    assert (layer.input_dtype, layer.input_scale, layer.input_zero_point) == ("uint8", None, None)
    assert found.coverage.share == 1.0


def test_only_products_can_read_the_grid_of_a_run():
    gemm = """g (float[n,5] x, float[5,7] w, float[7] b) => (float[n,7] y) { [p] y = Gemm(x, w, b) }"""
    m = made(gemm)
    plan, _ = quantized(m, {"x": X[0]})
    with pytest.raises(UnsupportedError, match="the plan rounds 'x' in every run, but not all that read it"):
        emit(m, replace(plan, dynamic=("x",)), fused=True)
    with pytest.raises(UnsupportedError, match="the plan rounds 'y' in every run, but does not quantize it"):
        emit(m, replace(plan, dynamic=("y",)), fused=True)
