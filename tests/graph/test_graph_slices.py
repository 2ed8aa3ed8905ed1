import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights

from onnxq import graph
from onnxq.runtime import Session, SessionConfig

X = weights(2, 4)
CHAIN = "g (float[2,4] x) => (float[2,4] y) { a = Neg(x) b = Exp(a) c = Relu(b) y = Neg(c) z = Abs(b) }"
PAIR = """g (float[n,4] x, float[4,3] w, float[3] b, float[3,4] v, float[3] d) => (float[n,3] y, float[n,3] z) {
    h = Relu(x)
    [one] p = MatMul(h, w)
    [bias] y = Add(b, p)
    [two] z = Gemm<transB = 1>(h, v, d)
}"""
QDQ = """g (float[4] x, float s, uint8 z, float t, int8 k) => (float[4] y) {
    q = QuantizeLinear(x, s, z)
    a = DequantizeLinear(q, s, z)
    b = Mul(a, a)
    r = QuantizeLinear(b, t, k)
    c = DequantizeLinear(r, t, k)
    y = Neg(c)
}"""


def pair():
    constants = {"w": weights(4, 3), "b": weights(3), "v": weights(3, 4), "d": weights(3, seed=1)}
    m = model(PAIR, **constants)
    return m, [graph.layer_of(node) for node in graph.nodes(m, "MatMul", "Gemm")]


def test_more_outputs():
    m = model(CHAIN)
    before = graph.to_bytes(m)
    more = graph.with_outputs(m, ["b", "y", "a", "b"])
    assert [value.name for value in more.graph.outputs] == ["y", "b", "a"]
    outputs = run(more, {"x": X})
    np.testing.assert_array_equal(outputs["a"], -X)
    np.testing.assert_allclose(outputs["b"], np.exp(-X), rtol=1e-6)
    assert graph.to_bytes(m) == before


def test_other_outputs_need_fewer_nodes():
    other = graph.with_outputs(model(CHAIN), ["a"], keep=False)
    assert ops(other) == ["Neg"]
    assert list(run(other, {"x": X})) == ["a"]
    assert ops(graph.with_outputs(model(CHAIN), ["z"], keep=False)) == ["Neg", "Exp", "Abs"]


def test_a_copy_shares_its_weights():
    m, _ = pair()
    copy = graph.with_outputs(m, ["h"])
    assert graph.value_map(copy)["w"].const_value is graph.value_map(m)["w"].const_value


def test_cutting_at_codes_gives_islands():
    constants = {"s": np.float32(0.1), "z": np.uint8(100), "t": np.float32(0.05), "k": np.int8(-100)}
    m = model(QDQ, **constants)
    before = graph.to_bytes(m)
    cut, entries = graph.cut_at_codes(m)
    assert entries == {"q": "q__given", "r": "r__given"}
    assert graph.to_bytes(m) == before
    session = Session(cut, SessionConfig(threads=1, optimize="off"))
    assert {spec.name: spec.dtype for spec in session.inputs} == {
        "x": "float32",
        "q__given": "uint8",
        "r__given": "int8",
    }
    x = np.asarray([0.5, -0.25, 1.0, 0.0], np.float32)
    given = {
        "x": x,
        "q__given": np.asarray([100, 110, 90, 255], np.uint8),
        "r__given": np.asarray([-100, 0, 1, 2], np.int8),
    }
    found = session.run(given)
    np.testing.assert_array_equal(found["q"], [105, 98, 110, 100])  # of x, not of what was given behind it
    np.testing.assert_array_equal(found["r"], [-100, -80, -80, 127])  # of the given codes 0, 1, -1, 15.5
    np.testing.assert_allclose(found["y"], -0.05 * np.asarray([0, 100, 101, 102]), rtol=1e-6)


def test_a_cut_model_given_its_own_codes_computes_the_same():
    m = model(QDQ, s=np.float32(0.1), z=np.uint8(100), t=np.float32(0.05), k=np.int8(-100))
    x = weights(4)
    cut, entries = graph.cut_at_codes(m)
    codes = run(graph.with_outputs(m, list(entries)), {"x": x})
    again = run(cut, {"x": x} | {entry: codes[name] for name, entry in entries.items()})
    assert_same_outputs(codes, {name: again[name] for name in codes})


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
def test_inputs_are_described(dtype):
    kind = {"float32": "float", "int64": "int64", "bool": "bool"}[dtype]
    m = model(f"g ({kind}[n,3,?] x) => ({kind}[n,3,?] y) {{ y = Identity(x) }}")
    assert graph.input_specs(m) == [("x", dtype, ("n", 3, None))]
