import numpy as np
import onnx
import onnx_ir
import pytest
from helpers import model, proto, run, weights

from onnxq import graph


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 5), (4, 2, 3), ()])
def test_int4_is_stored_two_to_a_byte_the_first_one_low(shape):
    made = model("g (float[1] x) => (float[1] y) { [n] y = Relu(x) }", 21)
    codes = np.random.default_rng(1).integers(-8, 8, shape).astype(np.int8)
    codes.reshape(-1)[0] = -8
    value = graph.add_packed(made, "c", codes)
    graph.add_node(made, "Cast", [value], "d", attributes={"to": graph.INT8})
    np.testing.assert_array_equal(run(graph.sub_model(made, [], ["d"]), {})["d"], codes)
    tensor = next(tensor for tensor in onnx.load_from_string(graph.to_bytes(made)).graph.initializer)
    flat = [*codes.reshape(-1).tolist(), 0]
    expected = bytes((flat[i] & 15) | (flat[i + 1] & 15) << 4 for i in range(0, codes.size, 2))
    assert tensor.data_type == onnx.TensorProto.INT4
    assert tensor.raw_data == expected
    assert graph.nbytes(made) == (codes.size + 1) // 2
    assert graph.dtype_name(value) == "int4"


def test_sources_are_the_constants_behind_a_value():
    text = """g (float[2,3] x, float[3,2] a, float[3,2] b, int64[2] s) => (float[2,2] y) {
        c = Add(a, b) d = Add(c, a) e = Reshape(d, s) [n] y = MatMul(x, e) f = Relu(x) g = RandomNormal<shape = [2]>()
        h = Add(g, g)
    }"""
    made = model(text, a=weights(3, 2), b=weights(3, 2, seed=1), s=np.asarray([3, 2]))
    values = graph.value_map(made)
    found = graph.sources(values["e"])
    assert sorted(value.name for value in found) == ["a", "b", "s"]
    assert graph.sources(values["a"]) == [values["a"]]
    for fed in ("x", "y", "f", "h"):
        assert graph.sources(values[fed]) is None
    assert graph.sources(None) == []
    made.graph.inputs.append(values["a"])  # may be fed now
    assert graph.sources(values["e"]) is None


def test_a_branch_is_no_constant():
    text = """g (float[2] x, bool c) => (float[2] y) {
        z = If(c) <then_branch = t () => (float[2] u) { u = Relu(x) }, else_branch = e () => (float[2] v) { v = Abs(x) }
        >
        y = Add(z, x)
    }"""
    made = model(text, c=np.asarray(True))
    assert graph.sources(graph.value_map(made)["z"]) is None


SPACE = "float[2,3,4] x, float[2,3,4] k"
# Operators that opset 14 changed, in forms that mean the same.
CHANGED = {
    "arithmetic": f"g ({SPACE}) => (float[2,3,4] y) {{ a = Add(x, k) b = Sub(a, k) c = Mul(b, x) y = Div(c, k) }}",
    "plain": f"g ({SPACE}, int64[2] s) => (float[2,12] y) {{ a = Relu(x) b = Identity(a) y = Reshape(b, s) }}",
    "zero": f"g ({SPACE}, int64[2] o) => (float[2,12] y) {{ y = Reshape(x, o) }}",
    "sum": f"g ({SPACE}, int64 i) => (float[2,3,4] y) {{ y = CumSum(x, i) }}",
    "norm": f"g ({SPACE}, float[3] m, float[3] v) => (float[2,3,4] y) "
    "{ y = BatchNormalization<epsilon = 0.1>(x, m, v, m, v) }",
    "lstm": f"g ({SPACE}, float[1,8,4] f, float[1,8,2] r) => (float[2,1,3,2] y) "
    "{ y = LSTM<hidden_size = 2>(x, f, r) }",
    "gru": f"g ({SPACE}, float[1,6,4] h, float[1,6,2] q) => (float[2,1,3,2] y) {{ y = GRU<hidden_size = 2>(x, h, q) }}",
    "rnn": f"g ({SPACE}, float[1,2,4] n, float[1,2,2] p) => (float[2,1,3,2] y) {{ y = RNN<hidden_size = 2>(x, n, p) }}",
}
CONSTANTS = {
    "k": weights(2, 3, 4, low=0.5, high=2),
    "s": np.asarray([2, -1]),
    "o": np.asarray([0, 12]),
    "i": np.asarray(1),
    "m": weights(3, low=0.5, high=2),
    "v": weights(3, seed=1, low=0.5, high=2),
    "f": weights(1, 8, 4),
    "r": weights(1, 8, 2),
    "h": weights(1, 6, 4),
    "q": weights(1, 6, 2),
    "n": weights(1, 2, 4),
    "p": weights(1, 2, 2),
}


@pytest.mark.parametrize("name", CHANGED)
def test_opset_14_means_the_same(name):
    text = CHANGED[name]
    inputs = {given: array for given, array in CONSTANTS.items() if f"] {given}" in text or f"int64 {given}" in text}
    made = model(text, 13, **inputs)
    feeds = {"x": weights(2, 3, 4, seed=9)}
    before = run(made, feeds)
    assert graph.raise_opset(made, 14)
    assert graph.opset(made) == 14
    made.ir_version = graph.lowest_ir_version(made)
    onnx.checker.check_model(graph.to_bytes(made), full_check=True)
    for output, expected in before.items():
        np.testing.assert_array_equal(run(made, feeds)[output], expected)


@pytest.mark.parametrize(("now", "wanted"), [(14, 14), (17, 14), (21, 14)])
def test_an_opset_that_is_new_enough_stays(now, wanted):
    made = model("g (float[1] x) => (float[1] y) { y = Relu(x) }", now)
    assert graph.raise_opset(made, wanted)
    assert graph.opset(made) == now


def test_what_might_mean_something_else_is_not_raised():
    text = f"""g ({SPACE}, float[3] m, float[3] v) => (float[2,3,4] y, float[3] z) {{
        y, z, a, b, c = BatchNormalization(x, m, v, m, v)
    }}"""
    inner = """g (float[2] x, bool c) => (float[2] y) {
        y = If(c) <then_branch = t () => (float[2] u) { u = Dropout(x) },
                   else_branch = e () => (float[2] v) { v = Neg(x) }>
    }"""
    trained = model(text, 13, m=CONSTANTS["m"], v=CONSTANTS["v"], k=CONSTANTS["k"])
    assert not graph.raise_opset(trained, 14)
    assert graph.opset(trained) == 13
    assert graph.raise_opset(model(inner, 13), 14)
    assert not graph.raise_opset(model("g (float[2,2] x) => (float[2,1] y) { y = ReduceMax<axes = [1]>(x) }", 17), 18)
    assert not graph.raise_opset(model(inner, 13), 16)  # If changed, and nobody said how
    other = proto("g (float[1] x) => (float[1] y) { y = Relu(x) }", 13)
    other.opset_import[0].domain = "ai.onnx"
    foreign = onnx_ir.from_proto(other)
    assert graph.raise_opset(foreign, 14)
    assert foreign.opset_imports == {"ai.onnx": 14}


def test_branches_are_looked_into():
    branch = "(float[1,3] u) { u, n, o, p, q = BatchNormalization(x, m, v, m, v) }"
    text = f"""g (float[1,3] x, bool c, float[3] m, float[3] v) => (float[1,3] y) {{
        y = If(c) <then_branch = t () => {branch}, else_branch = e () => (float[1,3] w) {{ w = Neg(x) }}>
    }}"""
    made = model(text, 13, m=CONSTANTS["m"], v=CONSTANTS["v"])
    assert not graph.raise_opset(made, 14)
    assert graph.opset(made) == 13
