"""Weighted layers: the kernels they become, and their integers."""

import numpy as np
import pytest
from emitting import assert_bias, assert_good, quantized, sqnr, stored
from helpers import model, run, weights

from onnxq import graph

SPREAD = np.asarray([0.01, 1.0, 30.0, 0.2, 5.0, 100.0], np.float32)
"""Ranges of output channels: with a single step, or along the wrong axis, the small ones vanish."""


def spread(w, axis):
    shape = [-1 if i == axis else 1 for i in range(w.ndim)]
    return w * SPREAD[: w.shape[axis]].reshape(shape)


def conv(attributes="", x=(2, 6, 7, 7), w=(6, 6, 3, 3), bias=False, behind="", seed=0):
    """x -> Conv called n -> `behind` -> y."""
    dims = [",".join(map(str, shape)) for shape in (x, w)]
    out = ",".join(["2", str(w[0]), *("def"[: len(w) - 2])])
    constants = {"w": spread(weights(*w, seed=seed), 0)}
    inputs = f"float[{dims[0]}] x, float[{dims[1]}] w"
    if bias:
        inputs, constants["b"] = f"{inputs}, float[{w[0]}] b", spread(weights(w[0], seed=3), 0)
    text = f"g ({inputs}, float z, float six) => (float[{out}] y)"
    constants |= {"z": np.float32(0), "six": np.float32(6)}
    first = "h" if behind else "y"
    body = f"[n] {first} = Conv{attributes}(x, w{', b' if bias else ''}) {behind}"
    return model(f"{text} {{ {body} }}", **constants), {"x": weights(*x, seed=5)}


CONVS = {
    "square": {},
    "bias": {"bias": True},
    "1x1": {"w": (6, 6, 1, 1)},
    "strided": {"attributes": "<strides = [2, 1], pads = [1, 0, 1, 2]>", "bias": True},
    "dilated": {"attributes": "<dilations = [2, 2]>"},
    "same": {"attributes": '<auto_pad = "SAME_UPPER">'},
    "group 2": {"attributes": "<group = 2>", "w": (6, 3, 3, 3), "bias": True},
    "depthwise": {"attributes": "<group = 6>", "w": (6, 1, 3, 3), "bias": True, "behind": "y = Conv(h, w1)"},
    "1-D": {"x": (2, 6, 9), "w": (6, 6, 3), "bias": True},
    "3-D": {"x": (2, 6, 5, 5, 5), "w": (6, 6, 2, 2, 2)},
    "relu": {"bias": True, "behind": "y = Relu(h)"},
    "clip": {"bias": True, "behind": "y = Clip(h, z, six)"},
}


@pytest.mark.parametrize("case", CONVS)
def test_a_convolution_becomes_an_integer_kernel(case):
    settings = dict(CONVS[case])
    if case == "depthwise":  # alone between float nodes it would stay float
        m, feeds = depthwise()
    else:
        m, feeds = conv(**settings)
    plan, emitted, ran = assert_good(m, feeds, least=20 if case == "clip" else 28)
    assert ran.count("QLinearConv") == len(plan.weights)
    assert not {"Conv", "FusedConv", "Relu", "Clip"} & set(ran)
    if "b" in graph.value_map(m):
        assert_bias(emitted, "n", graph.constant(graph.value_map(m)["b"]), plan.tensors["x"].scale)


def depthwise():
    text = """g (float[2,6,7,7] x, float[6,1,3,3] w, float[6] b, float[6,6,1,1] v) => (float[2,6,5,5] y) {
        [n] h = Conv<group = 6>(x, w, b) [m] y = Conv(h, v)
    }"""
    constants = {"w": spread(weights(6, 1, 3, 3), 0), "b": spread(weights(6), 0), "v": weights(6, 6, 1, 1)}
    return model(text, **constants), {"x": weights(2, 6, 7, 7, seed=5)}


def test_a_chain_of_convolutions_stays_in_integers():
    text = """g (float[2,3,8,8] x, float[6,3,3,3] w, float[6] b, float[6,6,3,3] v, float[4,6,1,1] u)
    => (float[2,4,4,4] y) {
        [a] h = Conv(x, w, b) i = Relu(h) [b] j = Conv(i, v) k = Relu(j) [c] y = Conv(k, u)
    }"""
    constants = {"w": weights(6, 3, 3, 3), "b": weights(6), "v": weights(6, 6, 3, 3), "u": weights(4, 6, 1, 1)}
    _, _, ran = assert_good(model(text, **constants), {"x": weights(2, 3, 8, 8, seed=5)})
    assert ran.count("QLinearConv") == 3
    assert ran.count("QuantizeLinear") == ran.count("DequantizeLinear") == 1


@pytest.mark.parametrize("batch", [1, 3])
def test_free_sizes_change_nothing(batch):
    text = """g (float[n,3,height,width] x, float[6,3,3,3] w, float[6] b, float[6,4] v) => (float[n,4] y) {
        h = Conv<pads = [1, 1, 1, 1]>(x, w, b) r = Relu(h) p = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(r)
        q = GlobalAveragePool(p) f = Flatten(q) y = MatMul(f, v)
    }"""
    m = model(text, w=weights(6, 3, 3, 3), b=weights(6), v=weights(6, 4))
    _, emitted, ran = assert_good(m, {"x": weights(2, 3, 8, 10, seed=5)}, least=20)
    assert {"QLinearConv", "NhwcMaxPool", "QLinearGlobalAveragePool"} <= set(ran)
    assert not {"Conv", "MatMul", "MaxPool"} & set(ran)
    assert run(emitted, {"x": weights(batch, 3, 6, 5)}, optimize="all")["y"].shape == (batch, 4)


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, (6,), (1, 6), (1,), ()])
@pytest.mark.parametrize("relu", [False, True])
def test_a_gemm_becomes_an_integer_kernel(transposed, bias, relu):
    w = spread(weights(6, 6), 0 if transposed else 1)
    b = None if bias is None else np.float32(3) * weights(*bias, seed=4)
    dims = "" if not bias else f"[{','.join(map(str, bias))}]"
    inputs = "float[5,6] x, float[6,6] w, float[6,4] v" + (f", float{dims} b" if bias is not None else "")
    body = f"[n] h = Gemm<transB = {transposed}>(x, w{', b' if bias is not None else ''})"
    body += " i = Relu(h) [m] y = MatMul(i, v)" if relu else " [m] y = MatMul(h, v)"
    constants = {"w": w, "v": weights(6, 4)} | ({} if bias is None else {"b": b})
    m = model(f"g ({inputs}) => (float[5,4] y) {{ {body} }}", **constants)
    plan, emitted, ran = assert_good(m, {"x": weights(5, 6, seed=5)}, least=28)
    integers = {"QGemm", "QLinearMatMul"} if bias is None else {"QGemm"}
    assert [op for op in ran if op in integers]
    assert not {"Gemm", "MatMul", "FusedGemm", "Relu"} & set(ran)
    if bias is not None:
        assert_bias(emitted, "n", np.broadcast_to(b.reshape(-1), 6), plan.tensors["x"].scale)


@pytest.mark.parametrize("rows", ["5", "n"])
@pytest.mark.parametrize("rank", [2, 3, 4])
@pytest.mark.parametrize("bias", ["none", "right", "left", "[1,6]"])
def test_a_matmul_becomes_an_integer_kernel_with_float_output(rows, rank, bias):
    shape = {2: (5, 6), 3: (5, 2, 6), 4: (5, 2, 3, 6)}[rank]
    dims = ",".join([rows, *map(str, shape[1:])])
    b = np.float32(3) * weights(6, seed=4)
    stored_bias = b.reshape(1, 6) if bias == "[1,6]" else b
    inputs = f"float[{dims}] x, float[6,6] w, float[{','.join(map(str, stored_bias.shape))}] b"
    add = {"none": "[n] y = MatMul(x, w)", "left": "[n] h = MatMul(x, w) y = Add(b, h)"}
    body = add.get(bias, "[n] h = MatMul(x, w) y = Add(h, b)")
    m = model(f"g ({inputs}) => (float[{dims}] y) {{ {body} }}", w=spread(weights(6, 6), 1), b=stored_bias)
    # with free sizes the bias is added in float: a vector, restored at every call
    free = rows == "n" and rank > 2 and bias != "none"
    feeds = {"x": weights(*shape, seed=5)}
    plan, emitted, ran = assert_good(m, feeds, least=28, restored=["n.bias_q"] if free else [])
    assert {"QGemm", "MatMulIntegerToFloat"} & set(ran)
    assert not {"Gemm", "MatMul"} & set(ran)
    assert ran.count("QuantizeLinear") == 1
    assert list(plan.tensors) == ["x"]  # the result stays float
    if bias != "none":
        assert_bias(emitted, "n", b, plan.tensors["x"].scale)


def test_one_output_channel_becomes_an_integer_kernel():
    text = "g (float[5,2,8] x, float[8,1] w, float[1] b) => (float[5,2,1] y) { [n] h = MatMul(x, w) y = Add(h, b) }"
    _, _, ran = assert_good(model(text, w=weights(8, 1), b=weights(1)), {"x": weights(5, 2, 8, seed=5)})
    assert "QGemm" in ran
    assert "Gemm" not in ran


@pytest.mark.parametrize(
    ("x", "b", "out"),
    [
        ("float[4,6] x", (1, 1, 6), "1,4,6"),
        ("float[6] x", (1, 6), "1,6"),
        ("float[4,6] x", (4, 6), "4,6"),
        ("float[4,6] x", (4, 1), "4,6"),
        ("float[4,6] x", (1,), "4,6"),
    ],
)
def test_additions_that_are_no_bias_keep_their_shape_and_the_kernel(x, b, out):
    inputs = f"{x}, float[6,6] w, float[{','.join(map(str, b))}] b"
    m = model(f"g ({inputs}) => (float[{out}] y) {{ h = MatMul(x, w) y = Add(h, b) }}", w=weights(6, 6), b=weights(*b))
    shape = (6,) if "[6]" in x else (4, 6)
    _, _, ran = assert_good(m, {"x": weights(*shape, seed=5)})
    assert "MatMulIntegerToFloat" in ran


@pytest.mark.parametrize("rows", ["4", "n"])
def test_adding_an_activation_to_a_product_keeps_the_kernel(rows):
    """The runtime would fuse the two into a Gemm without an integer kernel."""
    text = f"g (float[{rows},6] x, float[{rows},6] r, float[6,6] w) => (float[{rows},6] y)"
    m = model(f"{text} {{ h = MatMul(x, w) [add] i = Add(r, h) y = Relu(i) }}", w=weights(6, 6))
    plan, _, ran = assert_good(m, {"x": weights(4, 6, seed=5), "r": weights(4, 6, seed=6)})
    assert plan.sums == ("add",)
    assert "MatMulIntegerToFloat" in ran
    assert not {"Gemm", "FusedGemm", "MatMul"} & set(ran)


@pytest.mark.parametrize("layer", ["Gemm(x, w, b)", "Gemm(x, w)", "MatMul(x, w)"])
@pytest.mark.parametrize("read", ["y = Tanh(h)", "y = Neg(h) t = Exp(h)", "y = Add(h, x)"])
@pytest.mark.parametrize("returned", ["", "float[5,6] h, "])
def test_a_linear_result_that_is_read_in_float_as_well_is_still_an_integer_kernel(layer, read, returned):
    text = f"g (float[5,6] x, float[6,6] w, float[6] b) => ({returned}float[5,6] y, float[5,6] z)"
    body = f"[n] h = {layer} {read} [m] z = Gemm(h, w, b)"
    m = model(f"{text} {{ {body} }}", w=weights(6, 6), b=weights(6))
    plan, _, ran = assert_good(m, {"x": weights(5, 6, seed=5)})
    assert {"QGemm", "MatMulIntegerToFloat"} & set(ran)
    assert not {"Gemm", "FusedGemm", "MatMul"} & set(ran)
    assert plan.guards == ("h",)


def test_a_shared_weight_is_stored_for_each_of_its_layers():
    text = "g (float[5,6] x, float[6,6] w) => (float[5,6] y) { [n] h = Gemm(x, w) [m] y = Gemm<transB = 1>(h, w) }"
    m = model(text, w=spread(weights(6, 6), 1))
    _, emitted, ran = assert_good(m, {"x": weights(5, 6, seed=5)})
    assert "w" not in emitted.graph.initializers
    assert stored(emitted, "n.weight_q").tolist() != stored(emitted, "m.weight_q").tolist()
    assert not {"Gemm", "MatMul"} & set(ran)


def test_a_bias_beyond_32_bits_is_still_right():
    text = "g (float[5,6] x, float[6,6] w, float[6] b) => (float[5,6] y) { [n] y = Gemm(x, w, b) }"
    w, b = np.float32(1e-5) * weights(6, 6), np.asarray([0, 1, 1e5, -1e5, 3e5, 1e-6], np.float32)
    m = model(text, w=w, b=b)
    feeds = {"x": np.float32(1e-3) * weights(5, 6, seed=5)}
    _, emitted = quantized(m, feeds)
    assert np.abs(stored(emitted, "n.bias_q").astype(np.float64)).max() <= 2**30 * (1 + 1e-5)
    assert sqnr(m, emitted, feeds) > 100


def test_dead_channels_stay_dead():
    w = weights(6, 6, 3, 3)
    w[2] = 0
    text = "g (float[2,6,7,7] x, float[6,6,3,3] w) => (float[2,6,5,5] y) { [n] y = Conv(x, w) }"
    m, feeds = model(text, w=w), {"x": weights(2, 6, 7, 7, seed=5)}
    _, emitted = quantized(m, feeds)
    assert not stored(emitted, "n.weight_q")[2].any()
    assert not run(emitted, feeds, optimize="all")["y"][:, 2].any()
