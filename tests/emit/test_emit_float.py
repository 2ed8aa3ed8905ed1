"""What stays float stays right: guards, branches, transformers."""

from dataclasses import replace

import numpy as np
import pytest
from emitting import assert_good, kernels, quantized, sqnr
from helpers import model, run, weights

from onnxq import graph
from onnxq.emit import emit

IMAGE = "float[2,3,8,8] x, float[6,3,3,3] w, float[6,6,3,3] v, float[4,6,1,1] u, float half, float four"
LARGE = np.where(np.arange(6) == 2, 200, 1).astype(np.float32)
"""Weights of input channel 2, which is always zero: they change nothing, but a single step for all weights is lost."""
CONSTANTS = {
    "w": weights(6, 3, 3, 3) * np.where(LARGE > 1, 0, 1).astype(np.float32).reshape(6, 1, 1, 1),
    "v": weights(6, 6, 3, 3) * LARGE.reshape(1, 6, 1, 1),
    "u": weights(4, 6, 1, 1),
    "half": np.float32(0.5),
    "four": np.float32(4),
}
FEEDS = {"x": weights(2, 3, 8, 8, seed=5)}


def kept(body):
    """A model whose node called f is to stay in float between convolutions."""
    constants = dict(CONSTANTS)
    if "ConvTranspose" in body:  # its input channels come first
        constants["v"] = weights(6, 6, 3, 3) * LARGE.reshape(6, 1, 1, 1)
    return model(f"g ({IMAGE}) => (float[2,4,p,q] y) {{ h = Conv(x, w) {body} }}", **constants)


BETWEEN = {
    "nothing": "[f] i = {op}(h, v) y = Conv(i, u)",
    "relu": "[f] i = {op}(h, v) j = Relu(i) y = Conv(j, u)",
    "clip": "[f] i = {op}(h, v) j = Clip(i, half, four) y = Conv(j, u)",
    "pool behind": "[f] i = {op}(h, v) j = MaxPool<kernel_shape = [2, 2]>(i) y = Conv(j, u)",
    "relu and pool behind": "[f] i = {op}(h, v) k = Relu(i) j = MaxPool<kernel_shape = [2, 2]>(k) y = Conv(j, u)",
    "transpose behind": "[f] i = {op}(h, v) j = Transpose<perm = [0, 1, 3, 2]>(i) y = Conv(j, u)",
    "transpose in front": "t = Transpose<perm = [0, 1, 3, 2]>(h) [f] i = {op}(t, v) j = Relu(i) y = Conv(j, u)",
}


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("between", BETWEEN)
def test_a_layer_kept_in_float_keeps_its_float_weights(op, between):
    """The runtime would give it int8 weights with a single step, without a word."""
    m = kept(BETWEEN[between].replace("{op}", op))
    plan, _, ran = assert_good(m, FEEDS, keep_float=["f"])
    assert "f" in plan.skipped
    assert len(plan.guards) == ran.count("Sum") == 1
    assert ran.count("QLinearConv") == 2


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_without_a_guard_the_runtime_would_lose_channels(op):
    """If this fails, the runtime has changed and guards may be needless."""
    m = kept(BETWEEN["relu"].replace("{op}", op))
    plan, emitted = quantized(m, FEEDS, keep_float=["f"])
    assert sqnr(m, emit(m, replace(plan, guards=())), FEEDS) < 15
    assert sqnr(m, emitted, FEEDS) > 25


@pytest.mark.parametrize(
    "body",
    ["[f] i = Gemm(a, v, b) r = Relu(i) y = MatMul(r, u)", "[f] i0 = MatMul(a, v) i = Add(i0, b) y = MatMul(i, u)"],
)
def test_a_linear_layer_kept_in_float_keeps_its_float_weights(body):
    inputs = "float[5,2,1,1] x, float[6,2,1,1] w, float[6,6] v, float[6] b, float[6,4] u"
    constants = {
        "w": weights(6, 2, 1, 1) * np.where(LARGE > 1, 0, 1).astype(np.float32).reshape(6, 1, 1, 1),
        "v": weights(6, 6) * LARGE.reshape(6, 1),
        "b": weights(6),
        "u": weights(6, 4),
    }
    m = model(f"g ({inputs}) => (float[5,4] y) {{ h = Conv(x, w) a = Squeeze(h) {body} }}", **constants)
    feeds = {"x": weights(5, 2, 1, 1, seed=5)}
    plan, _, ran = assert_good(m, feeds, keep_float=["f"])
    assert len(plan.guards) == ran.count("Sum") == 1
    assert sqnr(m, emit(m, replace(plan, guards=())), feeds) < 15


def test_softmax_between_convolutions_stays_float():
    m = kept("[f] i = Softmax<axis = 1>(h) y = Conv(i, u)")
    _, _, ran = assert_good(m, FEEDS)
    assert "Softmax" in ran
    assert "QLinearSoftmax" not in ran


@pytest.mark.parametrize(
    ("then", "other", "size"),
    [
        ("m = Relu(h)", "n = Neg(h)", 6),
        ("m = Relu(h)", "n = Neg(z)", 6),  # h is read by a branch alone
        ("m = Conv(h, v)", "n = Conv(z, v)", 4),
    ],
)
@pytest.mark.parametrize("flag", [True, False])
def test_branches_read_the_right_values(then, other, size, flag):
    out = f"float[2,6,{size},{size}]"
    text = f"""g ({IMAGE}, bool c, float[2,6,6,6] z) => (float[2,4,p,q] y) {{
        h = Conv(x, w)
        k = If(c) <then_branch = t () => ({out} m) {{ {then} }}, else_branch = e () => ({out} n) {{ {other} }}>
        y = Conv(k, u)
    }}"""
    m = model(text, **CONSTANTS)
    feeds = FEEDS | {"c": np.asarray(flag), "z": weights(2, 6, 6, 6, seed=8)}
    _, emitted, ran = assert_good(m, feeds)
    assert "If" in ran
    assert ran.count("QLinearConv") == 2
    inner = next(graph.nodes(emitted, "If"))
    assert [node.op_type for node in inner.attributes["then_branch"].value] == [then.split()[2].split("(")[0]]


def test_a_loop_reads_the_right_values():
    text = f"""g ({IMAGE}, int64 trips, bool go, float[2,6,6,6] z) => (float[2,4,6,6] y) {{
        h = Conv(x, w)
        k = Loop(trips, go, z) <body = b (int64 n, bool c, float[2,6,6,6] s) => (bool d, float[2,6,6,6] t) {{
            d = Identity(c)
            t = Add(s, h)
        }}>
        y = Conv(k, u)
    }}"""
    m = model(text, **CONSTANTS)
    feeds = FEEDS | {"trips": np.asarray(3), "go": np.asarray(True), "z": weights(2, 6, 6, 6, seed=8)}
    assert_good(m, feeds)


SHAPES = {"wq": (8, 8), "wk": (8, 8), "wv": (8, 8), "wo": (8, 8), "wu": (8, 16), "wd": (16, 8), "b": (8,), "c": (16,)}
BLOCK = """
    q0 = MatMul(x, wq) q = Add(q0, b) k0 = MatMul(x, wk) k = Add(b, k0) v0 = MatMul(x, wv) v = Add(v0, b)
    kt = Transpose<perm = [0, 2, 1]>(k) s = MatMul(q, kt) p = Softmax(s) m = MatMul(p, v)
    o0 = MatMul(m, wo) o = Add(o0, b) r = Add(x, o) n = LayerNormalization<axis = -1>(r, g, b)
    u0 = MatMul(n, wu) u = Add(u0, c) e = Tanh(u) f = Mul(u, e) d0 = MatMul(f, wd) d = Add(d0, b)
    t = Add(d, n) y = LayerNormalization<axis = -1>(t, g, b)
"""


@pytest.mark.parametrize("rows", ["2", "n"])
def test_a_transformer_block(rows):
    inputs = "".join(f", float[{','.join(map(str, shape))}] {name}" for name, shape in SHAPES.items())
    constants = {name: weights(*shape, seed=n) for n, (name, shape) in enumerate(SHAPES.items())}
    text = f"g (float[{rows},5,8] x{inputs}, float[8] g) => (float[{rows},5,8] y) {{ {BLOCK} }}"
    m = model(text, **constants, g=weights(8, seed=9, low=0.5, high=1.5))
    linear = [node for node in graph.nodes(m, "MatMul") if graph.constant(node.inputs[1]) is not None]
    restored = [f"{node.name}.bias_q" for node in linear]
    plan, _, ran = assert_good(m, {"x": weights(2, 5, 8, seed=5)}, restored=restored if rows == "n" else [])
    assert ran.count("QGemm") + ran.count("MatMulIntegerToFloat") == 6
    assert ran.count("MatMul") + ran.count("FusedMatMul") == 2  # attention
    assert ran.count("LayerNormalization") == 2
    assert ran.count("Sum") == len(plan.sums) == 2
    assert "SkipLayerNormalization" not in ran
    assert not {"QLinearSoftmax", "QLinearAdd", "QLinearMul"} & set(ran)


def test_a_residual_written_as_a_sum_may_be_an_output():
    text = "g (float[2,8] x, float[8,8] w, float[8] b, float[8] g) => (float[2,8] r, float[2,8] y)"
    body = "h = Gemm(x, w, b) [add] r = Add(h, x) y = LayerNormalization(r, g)"
    m = model(f"{text} {{ {body} }}", w=weights(8, 8), b=weights(8), g=weights(8, low=0.5, high=1.5))
    plan, emitted, ran = assert_good(m, {"x": weights(2, 8, seed=5)})
    assert plan.sums == ("add",)
    assert "Sum" in ran
    assert [value.name for value in emitted.graph.outputs] == ["r", "y"]


def test_a_linear_layer_in_front_of_float_nodes_needs_one_quantization():
    text = "g (float[2,5,8] x, float[8,8] w, float[8] b) => (float[2,5,8] y)"
    m = model(f"{text} {{ h = MatMul(x, w) i = Add(h, b) y = Tanh(i) }}", w=weights(8, 8), b=weights(8))
    _, emitted = quantized(m, {"x": weights(2, 5, 8, seed=5)})
    assert kernels(emitted).count("QuantizeLinear") == 1
    assert "DequantizeLinear" not in kernels(emitted)


@pytest.mark.parametrize("rows", ["4", "n"])
@pytest.mark.parametrize("behind", ["LayerNormalization(i, g)", "Tanh(i)"])
@pytest.mark.parametrize("layer", ["Gemm(x, w)", "MatMul(x, w)", "Gemm(x, w, g)"])
def test_a_layer_and_a_residual_are_fused_only_where_that_stays_integer(rows, behind, layer):
    """The runtime makes a float Gemm of MatMul + Add, and of Gemm + Sum, where the layer has no bias."""
    text = f"g (float[{rows},8] x, float[{rows},8] r, float[8,8] w, float[8] g) => (float[{rows},8] y)"
    m = model(f"{text} {{ h = {layer} i = Add(r, h) y = {behind} }}", w=weights(8, 8), g=weights(8, low=0.5, high=1.5))
    _, _, ran = assert_good(m, {"x": weights(4, 8, seed=5), "r": weights(4, 8, seed=6)})
    assert {"QGemm", "MatMulIntegerToFloat", "QLinearMatMul"} & set(ran)
    assert not {"Gemm", "FusedGemm", "MatMul"} & set(ran)


def test_float_nodes_read_what_is_still_float():
    text = "g (float[2,8] x, float[8,8] w, float[8] b) => (float[2,8] y, float[2,8] t, float[2,8] z)"
    body = "t = Tanh(x) h = Gemm(x, w, b) y = Exp(h) z = Gemm(h, w, b)"
    m, feeds = model(f"{text} {{ {body} }}", w=weights(8, 8) / 3, b=weights(8)), {"x": weights(2, 8, seed=5)}
    plan, emitted, _ = assert_good(m, feeds)
    np.testing.assert_array_equal(run(emitted, feeds)["t"], run(m, feeds)["t"])
    assert not plan.tensors["h"].everywhere
    h = graph.value_map(emitted)["h"]
    assert {node.op_type for node in graph.users(h)} == {"Exp", "Sum"}  # the Sum leads to the grid


def test_float_nodes_read_the_grid_where_nothing_else_is_left():
    text = f"g ({IMAGE}) => (float[2,4,p,q] y, float[2,6,6,6] z)"
    m = model(f"{text} {{ h = Conv(x, w) z = Tanh(h) y = Conv(h, u) }}", **CONSTANTS)
    plan, emitted, _ = assert_good(m, FEEDS)
    assert plan.tensors["h"].everywhere
    tanh = next(graph.nodes(emitted, "Tanh"))
    assert graph.producer(tanh.inputs[0], "DequantizeLinear") is not None
