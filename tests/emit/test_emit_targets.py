"""Files for other targets than the CPU: their structure, and that they compute what they say."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
from emitting import quantized, stored
from helpers import model, run, weights

from onnxq import graph
from onnxq.emit import emit
from onnxq.errors import UnsupportedError
from onnxq.plan import Precision
from onnxq.runtime import Session, SessionConfig
from onnxq.types import BlockGrid, LearnedLayer, QuantPlan
from onnxq.types.target import OPENVINO, QNN, TENSORRT

RESIDUAL = """g (float[N,3,8,8] x, float[6,3,3,3] w1, float[6,6,3,3] w2, float[6,6,3,3] w3, float[6] b, float[6,5] f,
    float[5] e) => (float[N,5] y) {
    c1 = Conv<pads = [1,1,1,1], strides = [2,1]>(x, w1, b)    r1 = Relu(c1)
    c2 = Conv<pads = [1,1,1,1]>(r1, w2, b)    r2 = Relu(c2)
    c3 = Conv<pads = [1,1,1,1]>(r2, w3)       s1 = Add(r1, c3)   r3 = Relu(s1)
    p = GlobalAveragePool(r3)                 h = Flatten(p)     m = MatMul(h, f)   y = Add(m, e)
}"""
ARRAYS = {
    "w1": weights(6, 3, 3, 3), "w2": weights(6, 6, 3, 3), "w3": weights(6, 6, 3, 3, seed=2), "b": weights(6),
    "f": weights(6, 5), "e": weights(5),
}  # fmt: skip
X = {"x": weights(4, 3, 8, 8)}


def written(emitted, feeds):
    """What the file says, every node as it is written."""
    return Session(emitted, SessionConfig(threads=1, simulate=True)).run(feeds)


def decibels(made, emitted, feeds):
    """Worst signal-to-noise ratio, as written and in the CPU's own kernels."""
    wanted, worst = run(made, feeds), np.inf
    for got in (written(emitted, feeds), run(emitted, feeds), run(emitted, feeds, optimize="all")):
        assert list(got) == list(wanted)
        for name, expected in wanted.items():
            assert got[name].dtype == expected.dtype
            noise = np.square(got[name].astype(np.float64) - expected).sum()
            worst = min(worst, 10 * np.log10(np.square(expected, dtype=np.float64).sum() / max(noise, 1e-30)))
    return worst


def pairs(emitted):
    """(input, scale, zero point, number of readers) of every QuantizeLinear; each is read by one DequantizeLinear."""
    for node in graph.nodes(emitted, "QuantizeLinear"):
        restored = graph.only_user(node.outputs[0])
        assert restored.op_type == "DequantizeLinear"
        assert list(restored.inputs[1:]) == list(node.inputs[1:])
        yield (
            node.inputs[0].name,
            graph.constant(node.inputs[1]),
            graph.constant(node.inputs[2]),
            graph.users(restored.outputs[0]),
        )


def restored(node, index):
    """(codes, scale, zero point, axis) behind a node's operand, None for a float one."""
    dq = graph.producer(node.inputs[index], "DequantizeLinear") if index < len(node.inputs) else None
    if dq is None:
        return None
    codes, scale, *zero = (graph.constant(value) for value in dq.inputs)
    return codes, scale, zero[0] if zero else None, graph.attribute(dq, "axis", None)


def test_a_tensorrt_file_has_symmetric_int8_alone_float_biases_and_a_pair_for_every_reader():
    made = model(RESIDUAL, **ARRAYS)
    plan, emitted = quantized(made, X, target=TENSORRT)
    onnx.checker.check_model(graph.to_bytes(emitted), full_check=True)
    seen = list(pairs(emitted))
    assert [name for name, *_ in seen].count("r1") == 2  # the convolution and the addition
    assert sorted({name for name, *_ in seen}) == ["h", "r1", "r2", "x"]
    for name, scale, zero, readers in seen:
        assert zero.dtype == np.int8
        assert zero == 0
        assert len(readers) == 1
        values = X["x"] if name == "x" else run(graph.with_outputs(made, [name]), X)[name]
        assert scale == pytest.approx(np.abs(values).max() / 127, rel=1e-6)
    assert not [node for node in graph.nodes(emitted) if any(array.dtype == np.int32 for array in constants(node))]
    for node in graph.nodes(emitted, "Conv", "MatMul"):
        codes, scale, zero, axis = restored(node, 1)
        assert codes.dtype == zero.dtype == np.int8
        assert axis == (0 if node.op_type == "Conv" else 1)
        assert -127 <= codes.min() <= codes.max() <= 127
        assert len(scale) == codes.shape[axis]
        assert restored(node, 2) is None
    bias = [graph.constant(node.inputs[2]) for node in graph.nodes(emitted, "Conv") if len(node.inputs) > 2]
    assert len(bias) == 2
    assert all(np.array_equal(array, ARRAYS["b"]) for array in bias)
    (addition, last) = graph.nodes(emitted, "Add")
    operands = [graph.producer(value) for value in addition.inputs]
    assert [node.op_type for node in operands] == ["DequantizeLinear", "Conv"]
    assert restored(last, 0) is None
    assert restored(last, 1) is None
    assert not list(graph.nodes(emitted, "Sum"))
    assert decibels(made, emitted, X) > 30
    assert plan.target == "tensorrt"


def constants(node):
    return [array for value in node.inputs if (array := graph.constant(value)) is not None]


def test_a_tensorrt_file_computes_what_its_grids_say():
    w, b = weights(5, 4, 3, 3), weights(5)
    text = "g (float[2,4,6,6] x, float[5,4,3,3] w, float[5] b) => (float[2,5,4,4] y) { y = Conv(x, w, b) }"
    made = model(text, w=w, b=b)
    feeds = {"x": weights(2, 4, 6, 6, low=-0.5, high=2.0)}
    _, emitted = quantized(made, feeds, target=TENSORRT)
    step = np.float32(np.abs(feeds["x"]).max() / 127)
    steps = (np.abs(w).max(axis=(1, 2, 3)) / 127).astype(np.float32).reshape(-1, 1, 1, 1)
    rounded = {"x": np.clip(np.rint(feeds["x"] / step), -128, 127) * step, "w": np.rint(w / steps) * steps}
    plain = model(text, w=rounded["w"].astype(np.float32), b=b)
    wanted = run(plain, {"x": rounded["x"].astype(np.float32)})["y"]
    np.testing.assert_allclose(written(emitted, feeds)["y"], wanted, rtol=1e-4, atol=1e-4)


def test_learned_biases_stay_float_where_biases_do():
    made = model(RESIDUAL, **ARRAYS)
    plan, _ = quantized(made, X, target=TENSORRT)
    nodes = graph.node_names(made)
    first, second, third, product = (name for name in plan.weights)
    moved = {
        first: weights(6, seed=7),
        third: weights(6, seed=8),  # had none
        product: weights(5, seed=9),
    }
    learned = {
        name: LearnedLayer(np.full(graph.constant(nodes[name].inputs[1]).shape, 3, np.int8), bias)
        for name, bias in moved.items()
    }
    emitted = emit(made, plan, learned=learned)
    after = graph.node_names(emitted)
    np.testing.assert_array_equal(graph.constant(after[first].inputs[2]), moved[first])
    np.testing.assert_array_equal(graph.constant(after[second].inputs[2]), ARRAYS["b"])  # shared before
    np.testing.assert_array_equal(graph.constant(after[third].inputs[2]), moved[third])
    last = list(graph.nodes(emitted, "Add"))[-1]
    np.testing.assert_array_equal(graph.constant(last.inputs[1]), moved[product])
    assert (restored(after[first], 1)[0] == 3).all()


def test_an_openvino_file_has_unsigned_activations_and_float_biases():
    made = model(RESIDUAL, **ARRAYS)
    plan, emitted = quantized(made, X, target=OPENVINO)
    seen = list(pairs(emitted))
    assert [name for name, *_ in seen] == list(plan.tensors)
    assert {zero.dtype for _, _, zero, _ in seen} == {np.dtype(np.uint8)}
    for node in graph.nodes(emitted, "Conv", "MatMul"):
        assert restored(node, 0) is None or restored(node, 0)[0] is None  # computed codes
        assert graph.producer(node.inputs[0]).op_type == "DequantizeLinear"
        assert restored(node, 1)[0].dtype == np.int8
        assert restored(node, 2) is None
    assert not list(graph.nodes(emitted, "Sum"))
    assert decibels(made, emitted, X) > 30


@pytest.mark.parametrize(("bits", "dtype", "least"), [(8, np.uint8, 28), (16, np.uint16, 35)])
def test_an_npu_file_has_nothing_between_grids(bits, dtype, least):
    made = model(
        """g (float[N,6,8] x, float[8,8] w, float[8] b, float[8] g, float[8] s, float[8,6] v, float k)
            => (float[N,6,6] y) {
            n = LayerNormalization<epsilon = 0.1>(x, g, s)  h = MatMul(n, w)  i = Add(h, b)
            t = Transpose<perm = [0,2,1]>(i)  q = MatMul(i, t)  z = Div(q, k)  a = Softmax(z)  o = MatMul(a, i)
            r = Sub(o, x)  e = Gelu(r)  y = MatMul(e, v)
        }""",
        opset=20,
        w=weights(8, 8), b=weights(8, seed=1), g=weights(8, seed=2), s=weights(8, seed=3), v=weights(8, 6),
        k=np.float32(2.7),
    )  # fmt: skip
    feeds = {"x": weights(3, 6, 8)}
    precision = Precision(activation_bits=bits, residual_bits=bits, first_last=8)
    plan, emitted = quantized(made, feeds, precision, target=QNN)
    graph.infer_shapes(emitted)
    assert {zero.dtype for _, _, zero, _ in pairs(emitted)} == {np.dtype(dtype)}
    for node in graph.nodes(emitted):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        assert all(graph.producer(value, "DequantizeLinear") is not None for value in node.inputs), node.op_type
        assert [user.op_type for user in graph.users(node.outputs[0])] == ["QuantizeLinear"]
    (norm,) = graph.nodes(emitted, "LayerNormalization")
    codes, step, _, _ = restored(norm, 2)
    assert codes.dtype == np.int32
    product = np.float32(plan.tensors["x"].scale) * np.float32(plan.constants["g"].scale)
    assert step == pytest.approx(product, rel=1e-6)
    np.testing.assert_array_equal(codes, np.rint(weights(8, seed=3).astype(np.float64) / step))
    assert restored(norm, 1)[0].dtype == dtype
    assert decibels(made, emitted, feeds) > least


def test_a_learned_bias_of_an_npu_gets_a_grid_that_holds_it():
    made = model(
        "g (float[N,4] x, float[4,3] w, float[3] b) => (float[N,3] y) { h = MatMul(x, w)  y = Add(h, b) }",
        w=weights(4, 3),
        b=np.array([0.1, -0.2, 0.3], np.float32),
    )
    feeds = {"x": weights(6, 4)}
    plan, plain = quantized(made, feeds, target=QNN)
    (name,) = plan.weights
    bias = np.array([1.0, -2.0, 0.5], np.float32)
    layer = graph.layer_of(graph.node_names(made)[name])
    codes = np.rint(layer.weight / plan.weights[name].scales[0]).astype(np.int8)
    emitted = emit(made, plan, learned={name: LearnedLayer(codes, bias)})
    codes, scale, zero, _ = restored(next(iter(graph.nodes(emitted, "Add"))), 1)
    np.testing.assert_allclose((codes.astype(np.float32) - zero) * scale, bias, atol=scale / 2 + 1e-6)
    assert scale == pytest.approx(3.0 / 255, rel=1e-3)
    assert list(restored(next(iter(graph.nodes(plain, "Add"))), 1)[0]) == [round(0.3 / 0.5 * 255), 0, 255]


@pytest.mark.parametrize("opset", [17, 21])
def test_tensorrt_reads_products_of_four_bits_in_blocks(opset):
    w = weights(256, 24)
    made = model("g (float[N,256] x, float[256,24] w) => (float[N,24] y) { h = MatMul(x, w)  y = Relu(h) }", opset, w=w)
    (name,) = (str(node.name) for node in graph.nodes(made, "MatMul"))
    plan = QuantPlan("tensorrt", graph.digest(made), {}, {}, (), {}, blocks={name: BlockGrid(4, 128)})
    emitted = emit(made, plan)
    assert graph.opset(emitted) == 21
    (node,) = graph.nodes(emitted, "DequantizeLinear")
    assert graph.attribute(node, "axis", None) == 0
    assert graph.attribute(node, "block_size", 0) == 128
    assert node.inputs[0].dtype.name == "INT4"
    assert graph.constant(node.inputs[1]).shape == (2, 24)
    steps = graph.constant(node.inputs[1])
    assert (steps > 0).all()  # TensorRT takes no others
    codes = np.clip(np.rint(w.reshape(2, 128, 24) / steps[:, None]), -8, 7)
    rounded = (codes * steps[:, None]).reshape(256, 24)
    assert np.square(rounded - w).sum() < 0.02 * np.square(w).sum()
    feeds = {"x": weights(5, 256)}
    np.testing.assert_allclose(run(emitted, feeds)["y"], np.maximum(feeds["x"] @ rounded, 0), rtol=1e-3, atol=1e-3)


def test_blocks_are_refused_where_they_cannot_be():
    made = model(
        """g (float[2,64] x, float[64,8] w) => (float[2] y) {
            h = MatMul(x, w)  y = ReduceMean<axes = [1], keepdims = 0>(h) }""",
        w=weights(64, 8),
    )  # fmt: skip
    product, mean = (str(node.name) for node in graph.nodes(made))
    plan = QuantPlan("tensorrt", "", {}, {}, (), {}, blocks={product: BlockGrid(4, 32)})
    with pytest.raises(UnsupportedError, match="opset 21"):
        emit(made, plan)
    with pytest.raises(UnsupportedError, match="no product"):
        emit(made, replace(plan, blocks={mean: BlockGrid(4, 32)}))
    with pytest.raises(UnsupportedError, match="'tpu'; known: cpu, tensorrt"):
        emit(made, replace(plan, target="tpu", blocks={}))
    with pytest.raises(UnsupportedError, match="names the node 'gone'"):
        emit(made, replace(plan, blocks={}, half=("gone",)))


def test_stored_weights_keep_their_names():
    made = model(RESIDUAL, **ARRAYS)
    plan, emitted = quantized(made, X, target=TENSORRT)
    for name in plan.weights:
        assert stored(emitted, f"{name}.weight_q").dtype == np.int8
