"""QDQ models without their roundings."""

import numpy as np
import pytest
from helpers import model, ops, run, weights

from onnxq import graph
from onnxq.emit import emit
from onnxq.grid import fake_quantize
from onnxq.plan import Precision, Range, make_plan, place

FOUR = Precision(weight_bits=4, activation_bits=4, first_last=4)


def emitted(m, feeds, precision=None, **choices):
    """(plan, QDQ model)."""
    placement = place(m, **choices)
    inner = [name for name in placement.tensors if name not in feeds]
    seen = dict(feeds) | run(graph.with_outputs(m, inner), feeds)
    ranges = {name: Range(float(seen[name].min()), float(seen[name].max()), "seen") for name in placement.tensors}
    plan = make_plan(m, placement, ranges, precision or Precision())
    return plan, emit(m, plan)


def chain():
    text = """g (float[2,4,6,6] x, float[6,4,3,3] w, float[6] b, float[3,6,1,1] v, float z, float six)
    => (float[2,6,4,4] i, float[2,3,4,4] y, float[2,6,4,4] p) {
        [a] h = Conv(x, w, b) i = Clip(h, z, six) [b] y = Conv(i, v) p = Sigmoid(i)
    }"""
    constants = {"w": weights(6, 4, 3, 3), "b": weights(6), "v": weights(3, 6, 1, 1)}
    return model(text, **constants, z=np.float32(0), six=np.float32(6)), {"x": weights(2, 4, 6, 6)}


@pytest.mark.parametrize("precision", [None, FOUR])
def test_what_remains_is_the_float_model_with_rounded_weights(precision):
    m, feeds = chain()
    plan, quantized = emitted(m, feeds, precision)
    before = graph.to_bytes(quantized)
    soft = graph.soften(quantized, plan.tensors)
    assert graph.to_bytes(quantized) == before
    assert set(ops(soft.model)) == {"Conv", "Clip", "Identity", "Sigmoid"}
    assert ops(soft.model).count("Clip") == 1  # the model's own
    assert set(soft.activations) == set(plan.tensors) >= {"x", "i"}
    assert soft.activations["i"] == "i"  # the graph output carries the name behind its rounding
    values = graph.value_map(soft.model)
    assert all(name in values for name in soft.activations.values())
    assert [output.name for output in soft.model.graph.outputs] == ["i", "y", "p"]
    nodes = graph.node_names(m)
    assert set(soft.weights) == {"a", "b"}
    for name, stored in soft.weights.items():
        layer, grid = graph.layer_of(nodes[name]), plan.weights[name]
        codes = graph.constant(graph.value_map(quantized)[f"{name}.weight_q"])
        steps = np.asarray(grid.scales, np.float32).reshape(-1, 1, 1, 1)
        np.testing.assert_array_equal(graph.constant(values[stored]), (codes * steps).astype(np.float32))
        low, high = (grid.along(ends, codes.ndim) for ends in grid.ends())
        off = np.abs(graph.constant(values[stored]) - layer.weight) / steps
        assert off[(codes > low) & (codes < high)].max() <= 0.51  # at its ends a grid cuts off
    assert set(soft.biases) == {"a"}
    step = plan.tensors["x"].scale * np.asarray(plan.weights["a"].scales)
    bias = graph.constant(values[soft.biases["a"]])
    np.testing.assert_allclose(bias, np.rint(weights(6) / step) * step, rtol=1e-5)
    replaced = {"w": graph.constant(values[soft.weights["a"]]), "v": graph.constant(values[soft.weights["b"]])}
    for name, array in replaced.items():
        reader = nodes["a" if name == "w" else "b"]
        graph.replace_constant(m, reader, 1, array)
    graph.replace_constant(m, nodes["a"], 2, bias)
    wanted, found = run(m, feeds), run(soft.model, feeds)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-4)


def test_guards_are_passed():
    from dataclasses import replace

    m, feeds = chain()
    plan, _ = emitted(m, feeds, FOUR)
    guarded = emit(m, replace(plan, guards=("i", "x")))
    assert ops(guarded).count("Sum") == 2
    soft = graph.soften(guarded, plan.tensors)
    assert not {"QuantizeLinear", "DequantizeLinear", "Sum"} & set(ops(soft.model))
    assert set(soft.activations) == set(plan.tensors)
    plain = graph.soften(emit(m, plan), plan.tensors)
    for name, value in run(plain.model, feeds).items():
        np.testing.assert_array_equal(run(soft.model, feeds)[name], value)


def test_a_sum_in_place_of_an_add_keeps_its_tensor():
    """A residual addition in float, whose result is normalised, and read by an integer product, too."""
    text = """g (float[2,5,8] x, float[8,8] w, float[8] b, float[8] s, float[8] o, float[8,3] v, float[3] c)
    => (float[2,5,8] n, float[2,5,3] y) {
        [a] h = MatMul(x, w) k = Add(h, b) [r] t = Add(k, x) n = LayerNormalization(t, s, o)
        [b] j = MatMul(t, v) y = Add(j, c)
    }"""
    constants = {"w": weights(8, 8), "b": weights(8), "s": weights(8), "o": weights(8, seed=1)}
    m = model(text, **constants, v=weights(8, 3), c=weights(3))
    feeds = {"x": weights(2, 5, 8)}
    plan, quantized = emitted(m, feeds)
    assert plan.sums == ("r",)
    assert "t" in plan.tensors
    soft = graph.soften(quantized, plan.tensors)
    assert set(soft.activations) == set(plan.tensors)
    assert set(soft.weights) == set(soft.biases) == {"a", "b"}
    found, wanted = run(soft.model, feeds), run(m, feeds)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=0.15)


@pytest.mark.parametrize("side", ["h, b", "b, h"])
def test_biases_of_products(side):
    text = f"""g (float[n,8] x, float[8,6] w, float[6] b, float[4,6] v, float[4] c, float[4,3] u) => (float[n,3] y) {{
        [a] h = MatMul(x, w) k = Add({side}) i = Relu(k) [b] j = Gemm<transB = 1>(i, v, c) [d] y = MatMul(j, u)
    }}"""
    constants = {"w": weights(8, 6), "b": weights(6), "v": weights(4, 6), "c": weights(4), "u": weights(4, 3)}
    m = model(text, **constants)
    feeds = {"x": weights(20, 8)}
    plan, quantized = emitted(m, feeds)
    soft = graph.soften(quantized, plan.tensors)
    assert set(soft.weights) == {"a", "b", "d"}
    assert set(soft.biases) == {"a", "b"}
    values = graph.value_map(soft.model)
    np.testing.assert_allclose(graph.constant(values[soft.biases["a"]]), weights(6), atol=0.01)
    np.testing.assert_allclose(graph.constant(values[soft.biases["b"]]), weights(4), atol=0.01)
    for name, stored in (("a", weights(8, 6)), ("b", weights(4, 6)), ("d", weights(4, 3))):
        np.testing.assert_allclose(graph.constant(values[soft.weights[name]]), stored, atol=0.02)


def test_constant_operands_become_floats():
    text = """g (float[2,4,6,6] x, float[6,4,3,3] w, float[6,1,1] k, float[3,6,1,1] v) => (float[2,3,4,4] y) {
        [a] h = Conv(x, w) i = Mul(h, k) [b] y = Conv(i, v)
    }"""
    m = model(text, w=weights(6, 4, 3, 3), k=weights(6, 1, 1), v=weights(3, 6, 1, 1))
    feeds = {"x": weights(2, 4, 6, 6)}
    plan, quantized = emitted(m, feeds)
    assert set(plan.constants) == {"k"}
    soft = graph.soften(quantized, plan.tensors)
    assert [op for op in ops(soft.model) if op != "Identity"] == ["Conv", "Mul", "Conv"]
    found = [graph.constant(value) for value in soft.model.graph.initializers.values()]
    kept = next(array for array in found if array is not None and array.shape == (6, 1, 1))
    grid = plan.constants["k"]
    from onnxq.grid import Grid

    wanted = fake_quantize(weights(6, 1, 1), grid.scale, grid.zero_point, Grid(grid.bits, grid.signed, symmetric=False))
    np.testing.assert_allclose(kept, wanted, rtol=1e-6)


def test_tables_of_embeddings_stay_in_codes():
    text = """g (int64[n,3] x, float[4096,8] e, float[8,6] w, float[6] b) => (float[n,3,6] y) {
        [g] h = Gather(e, x) [a] j = MatMul(h, w) y = Add(j, b)
    }"""
    m = model(text, e=weights(4096, 8), w=weights(8, 6), b=weights(6))
    feeds = {"x": np.random.default_rng(0).integers(0, 4096, (4, 3))}
    plan, quantized = emitted(m, feeds)
    assert plan.tables == ("g",)
    soft = graph.soften(quantized, plan.tensors)
    kept = ops(soft.model)
    assert "QuantizeLinear" not in kept
    assert "DequantizeLinear" in kept or "Mul" in kept
    dtypes = {graph.constant(value).dtype.name for value in soft.model.graph.initializers.values()}
    assert "int8" in dtypes
    assert set(soft.weights) == {"a"}
    np.testing.assert_allclose(run(soft.model, feeds)["y"], run(m, feeds)["y"], atol=0.1)


def test_a_rounding_of_no_tensor_of_the_plan():
    m, feeds = chain()
    plan, quantized = emitted(m, feeds)
    with pytest.raises(ValueError, match="restores no tensor of the plan"):
        graph.soften(quantized, set(plan.tensors) - {"x"})
