"""Files that compute in float16."""

import numpy as np
import onnx
import pytest
from helpers import model, run, weights

from onnxq import graph
from onnxq.calibrate import extremes
from onnxq.emit import emit
from onnxq.emit.nbits import round_blocks
from onnxq.plan.half import half_plan
from onnxq.types import BlockGrid
from onnxq.types.target import CUDA

NET = """g (float[N,3,6,6] x, float[4,3,3,3] w, float[4] b, float[4] g, float[64,5] f)
    => (float[N,5] y, float[N,4,4,4] s) {
    c = Conv(x, w, b)  i = InstanceNormalization<epsilon = 0.1>(c, g, b)  r = Relu(i)  a = Mul(r, c)
    s = Sigmoid(a)  h = Flatten(s)  m = MatMul(h, f)  y = Softmax(m)
}"""
ARRAYS = {"w": weights(4, 3, 3, 3), "b": weights(4), "g": weights(4, seed=1), "f": weights(64, 5)}
X = {"x": weights(3, 3, 6, 6)}


def emitted(made, feeds, **choices):
    plan = half_plan(made, extremes(made, [feeds]), CUDA, **choices)
    return plan, emit(made, plan)


def test_layers_compute_in_float16_and_the_interface_stays():
    made = model(NET, **ARRAYS)
    before = graph.to_bytes(made)
    _, found = emitted(made, X)
    assert graph.to_bytes(made) == before
    onnx.checker.check_model(graph.to_bytes(found), full_check=True)
    graph.infer_shapes(found)
    kinds = {name: value.dtype.name for name, value in graph.value_map(found).items()}
    assert [(value.name, value.dtype.name) for value in found.graph.inputs] == [("x", "FLOAT")]
    assert [(value.name, value.dtype.name) for value in found.graph.outputs] == [("y", "FLOAT"), ("s", "FLOAT")]
    assert kinds["i"] == "FLOAT"
    assert {kinds[name] for name in ("c", "r", "a", "h", "m")} == {"FLOAT16"}
    for node in graph.nodes(found, "Conv", "MatMul"):
        assert {value.dtype.name for value in node.inputs} == {"FLOAT16"}
    for node in graph.nodes(found, "InstanceNormalization", "Softmax"):
        assert {value.dtype.name for value in (*node.inputs, *node.outputs)} == {"FLOAT"}
    assert "f" not in kinds  # what nobody reads in float32 is stored once


def test_a_value_is_cast_once_for_all_its_readers():
    made = model(
        """g (float[N,4] x, float[4,4] w, float[4,4] v) => (float[N,4] y) {
            a = MatMul(x, w)  b = MatMul(x, v)  c = Add(a, b)  d = Softmax(c)  e = Exp(c)  y = Add(d, e) }""",
        w=weights(4, 4),
        v=weights(4, 4, seed=1),
    )
    _, found = emitted(made, {"x": weights(5, 4)})
    assert [node.op_type for node in graph.nodes(found)] == [
        "Cast", "MatMul", "MatMul", "Add", "Cast", "Softmax", "Exp", "Add"
    ]  # fmt: skip


def test_the_values_are_those_of_float16():
    made = model(NET, **ARRAYS)
    _, found = emitted(made, X)
    wanted, got = run(made, X), run(found, X)
    for name, expected in wanted.items():
        assert got[name].dtype == np.float32
        error = np.abs(got[name] - expected).max() / np.abs(expected).max()
        assert 1e-6 < error < 4e-3


def test_weights_are_rounded_to_float16_alone():
    w = weights(8, 3)
    made = model("g (float[N,8] x, float[8,3] w) => (float[N,3] y) { y = MatMul(x, w) }", w=w)
    _, found = emitted(made, {"x": weights(2, 8)})
    (stored,) = (graph.constant(value) for value in found.graph.initializers.values())
    np.testing.assert_array_equal(stored, w.astype(np.float16))


@pytest.mark.parametrize("inputs", [64, 80])
def test_few_bits_are_read_in_blocks_by_half_activations(inputs):
    w = weights(inputs, 24)
    made = model(
        f"g (float[N,{inputs}] x, float[{inputs},24] w) => (float[N,24] y) {{ h = MatMul(x, w)  y = Relu(h) }}", w=w
    )
    (name,) = (str(node.name) for node in graph.nodes(made, "MatMul"))
    feeds = {"x": weights(3, inputs)}
    plan, found = emitted(made, feeds, blocks={name: BlockGrid(4, 32)})
    assert plan.blocks == {name: BlockGrid(4, 32)}
    (node,) = (node for node in graph.nodes(found) if node.op_type == "MatMulNBits")
    assert (graph.attribute(node, "bits", 0), graph.attribute(node, "block_size", 0)) == (4, 32)
    assert graph.constant(node.inputs[2]).dtype == np.float16
    assert graph.constant(node.inputs[1]).dtype == np.uint8
    rounded = round_blocks(w, 4, 32, signed=True).floats()
    wanted = np.maximum(feeds["x"] @ rounded, 0)
    np.testing.assert_allclose(run(found, feeds)["y"], wanted, atol=0.03 * np.abs(wanted).max())


def test_outputs_that_are_half_results_and_read_inside_keep_their_name():
    made = model(
        "g (float[N,4] x, float[4,4] w) => (float[N,4] h, float[N,4] y) { h = MatMul(x, w)  y = MatMul(h, w) }",
        w=weights(4, 4),
    )
    feeds = {"x": weights(3, 4)}
    _, found = emitted(made, feeds)
    assert [node.op_type for node in graph.nodes(found)].count("Cast") == 3
    got, wanted = run(found, feeds), run(made, feeds)
    assert list(got) == ["h", "y"]
    for name in got:
        np.testing.assert_allclose(got[name], wanted[name], rtol=1e-2, atol=1e-2)
