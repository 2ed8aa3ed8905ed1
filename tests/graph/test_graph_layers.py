import numpy as np
import pytest
from helpers import model, weights

from onnxq import graph

X4 = "float[2,4] x"


def layer(text, opset=17, **constants):
    """What `layer_of` says of the node called n."""
    return graph.layer_of(graph.node_names(model(text, opset, **constants))["n"])


@pytest.mark.parametrize("bias", [False, True])
def test_a_convolution_keeps_axis_0(bias):
    text = f"g (float[1,3,5,5] x, float[6,3,2,2] w{', float[6] b' if bias else ''}) => (float[1,6,4,4] y)"
    constants = {"w": weights(6, 3, 2, 2)} | ({"b": weights(6)} if bias else {})
    found = layer(f"{text} {{ [n] y = Conv(x, w{', b' if bias else ''}) }}", **constants)
    assert (found.axis, found.channels) == (0, 6)
    np.testing.assert_array_equal(found.weight, weights(6, 3, 2, 2))
    np.testing.assert_array_equal(found.bias, weights(6) if bias else None)
    assert found.data.name == "x"
    assert found.output.name == "y"
    assert found.bias_add is None


def test_a_transposed_convolution_keeps_axis_1():
    text = "g (float[1,6,5,5] x, float[6,3,2,2] w) => (float[1,3,6,6] y) { [n] y = ConvTranspose(x, w) }"
    found = layer(text, w=weights(6, 3, 2, 2))
    assert (found.axis, found.channels) == (1, 3)


@pytest.mark.parametrize(("transposed", "axis"), [(0, 1), (1, 0)])
@pytest.mark.parametrize("shape", [None, (3,), (1, 3), (1,), ()])
def test_a_gemm_keeps_the_axis_of_its_outputs(transposed, axis, shape):
    w = weights(3, 4) if transposed else weights(4, 3)
    dims = "" if not shape else f"[{','.join(map(str, shape))}]"
    text = f"g ({X4}, float[{w.shape[0]},{w.shape[1]}] w{f', float{dims} b' if shape is not None else ''})"
    constants = {"w": w} | ({"b": weights(*shape)} if shape is not None else {})
    inputs = "x, w, b" if shape is not None else "x, w"
    found = layer(f"{text} => (float[2,3] y) {{ [n] y = Gemm<transB = {transposed}>({inputs}) }}", **constants)
    assert (found.axis, found.channels) == (axis, 3)
    if shape is None:
        assert found.bias is None
    else:
        np.testing.assert_array_equal(found.bias, np.broadcast_to(weights(*shape).reshape(-1), 3))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("shape", [(3,), (1, 3), (1, 1, 3)])
def test_the_add_behind_a_matmul_is_its_bias(swapped, shape):
    dims = ",".join(map(str, shape))
    text = f"""g (float[2,5,4] x, float[4,3] w, float[{dims}] b) => (float[2,5,3] y) {{
        [n] h = MatMul(x, w) [add] y = Add({"b, h" if swapped else "h, b"})
    }}"""
    found = layer(text, w=weights(4, 3), b=weights(*shape))
    assert (found.axis, found.channels) == (1, 3)
    np.testing.assert_array_equal(found.bias, weights(*shape).reshape(3))
    assert found.bias_add.name == "add"
    assert found.output.name == "y"


def test_one_output_channel_has_a_bias_of_one_value():
    text = "g (float[2,5,4] x, float[4,1] w, float[1] b) => (float[2,5,1] y) { [n] h = MatMul(x, w) y = Add(h, b) }"
    found = layer(text, w=weights(4, 1), b=weights(1))
    assert found.bias.shape == (1,)


@pytest.mark.parametrize(
    ("x", "b", "shape"),
    [
        ("float[2,4] x", "float[1,1,3] b", (1, 1, 3)),  # adds an axis
        ("float[4] x", "float[1,3] b", (1, 3)),  # likewise
        ("float[2,5,4] x", "float[1] b", (1,)),  # the runtime leaves a lone number in an Add
        ("float[2,5,4] x", "float b", ()),
        ("float[2,5,4] x", "float[5,3] b", (5, 3)),
        ("float[2,5,4] x", "float[5,1] b", (5, 1)),
        ("float[2,5,4] x", "float[1,1,1,3] b", (1, 1, 1, 3)),
    ],
)
def test_other_additions_are_no_bias(x, b, shape):
    text = f"g ({x}, float[4,3] w, {b}) => (float y) {{ [n] h = MatMul(x, w) y = Add(h, b) }}"
    found = layer(text, w=weights(4, 3), b=weights(*shape))
    assert found.bias is None
    assert found.bias_add is None
    assert found.output.name == "h"


@pytest.mark.parametrize(
    "body",
    [
        "[n] h = MatMul(x, w) y = Add(h, b) z = Neg(h)",
        "[n] h = MatMul(x, w) y = Sub(h, b)",
        "[n] h = MatMul(x, w) y = Add(h, h)",
        "[n] h = MatMul(x, w) y = Add(h, x)",
    ],
)
def test_what_else_is_behind_a_matmul_is_no_bias(body):
    found = layer(
        f"g (float[2,3] x, float[3,3] w, float[3] b) => (float y) {{ {body} }}", w=weights(3, 3), b=weights(3)
    )
    assert found.bias is None
    assert found.output.name == "h"


def test_a_matmul_that_is_returned_has_no_bias():
    text = "g (float[2,3] x, float[3,3] w, float[3] b) => (float[2,3] h, float[2,3] y)"
    found = layer(f"{text} {{ [n] h = MatMul(x, w) y = Add(h, b) }}", w=weights(3, 3), b=weights(3))
    assert found.bias is None


REFUSED = {
    "Relu has no weights": "{ [n] y = Relu(x) }",
    "its first operand is the constant one": "{ [n] y = MatMul(w, x) }",
    "its input is a constant": "{ [n] y = Gemm(w, x) }",
    "both operands are computed at run time": "{ [n] y = MatMul(x, x) }",
    "its weight is not a constant": "{ [n] y = Gemm(x, x) }",
    "its first operand is transposed": "{ [n] y = Gemm<transA = 1>(x, w) }",
    "alpha or beta is not 1": "{ [n] y = Gemm<alpha = 0.5>(x, w) }",
    "alpha or beta is not 1 ": "{ [n] y = Gemm<beta = 2.0>(x, w, b) }",
    "its bias is not a constant": "{ [n] y = Gemm(x, w, x) }",
    "its bias has shape [4, 4]": "{ [n] y = Gemm(x, w, w) }",
    "its weight holds infinities or NaN": "{ [n] y = Gemm(x, v) }",
    "its weight holds infinities or NaN ": "{ [n] y = MatMul(x, u) }",
    "its weight has 3 axes": "{ [n] y = MatMul(x, t) }",
}


@pytest.mark.parametrize(("reason", "body"), REFUSED.items())
def test_what_is_no_layer_says_why(reason, body):
    bad, worse = weights(4, 4).copy(), weights(4, 4).copy()
    bad[1, 2], worse[0, 0] = np.inf, np.nan
    text = "g (float[4,4] x, float[4,4] w, float[4,4] v, float[4,4] u, float[2,4,4] t, float[4] b) => (float y)"
    found = layer(f"{text} {body}", w=weights(4, 4), v=bad, u=worse, t=weights(2, 4, 4), b=weights(4))
    assert found == reason.strip()


def test_convolutions_that_are_no_layers_say_why():
    text = "g (float[1,3,5] x, float[6,3,2] w, float[6] c, {kind}[6,3,2] v) => (float[1,6,4] y)"
    constants = {"w": weights(6, 3, 2)}
    made = text.replace("{kind}", "float")
    assert layer(f"{made} {{ [n] y = Conv(x, v) }}", **constants) == "its weight is not a constant"
    assert layer(f"{made} {{ [n] y = Conv(x, w, c) }}", **constants) == "its bias is not a constant"
    double = "g (double[1,3,5] x, double[6,3,2] w) => (double[1,6,4] y) { [n] y = Conv(x, w) }"
    assert layer(double, w=weights(6, 3, 2).astype(np.float64)) == "its weight is float64"


def test_operators_of_other_domains_are_no_layers():
    m = model("g (float[2,4] x, float[4,3] w) => (float[2,3] y) { y = MatMul(x, w) }", w=weights(4, 3))
    values = graph.value_map(m)
    made = graph.add_node(m, "MatMul", [values["x"], values["w"]], "own", domain="our.domain")
    assert graph.layer_of(made.producer()) == "MatMul has no weights"


def activation(body, **constants):
    inputs = "".join(f", float {name}" for name in constants)
    m = model(f"g (float[4] x{inputs}) => (float[4] y) {{ h = Neg(x) {body} }}", **constants)
    return graph.activation_after(graph.value_map(m)["h"])


@pytest.mark.parametrize(
    ("body", "bounds"),
    [
        ("y = Relu(h)", (0.0, np.inf)),
        ("y = Clip(h, a, b)", (0.0, 6.0)),
        ("y = Clip(h, c, b)", (-1.0, 6.0)),
        ("y = Clip(h, c)", (-1.0, np.inf)),
        ("y = Clip(h, , b)", (-np.inf, 6.0)),
        ("y = Clip(h, c, a)", (-1.0, 0.0)),
        ("y = Clip(h)", (-np.inf, np.inf)),
    ],
)
def test_an_activation_and_its_bounds(body, bounds):
    found = activation(body, a=np.float32(0), b=np.float32(6), c=np.float32(-1))
    assert (found.low, found.high) == bounds
    assert found.node.outputs[0].name == "y"


@pytest.mark.parametrize(
    "body",
    [
        "y = Clip(h, d, b)",  # 0 is outside
        "y = Clip(h, c, e)",
        "y = Clip(h, a, a)",
        "y = Clip(h, f, b)",  # a computed bound
        "y = Relu(h) z = Abs(h)",
        "y = LeakyRelu(h)",
        "y = Add(h, h)",
    ],
)
def test_no_activation_to_absorb(body):
    values = {"a": 0.0, "b": 6.0, "c": -1.0, "d": 0.5, "e": -0.5}
    constants = {name: np.float32(value) for name, value in values.items()}
    assert activation(f"f = ReduceMax(x) {body}", **constants) is None


def test_an_output_of_the_graph_is_not_absorbed():
    m = model("g (float[4] x) => (float[4] h, float[4] y) { h = Neg(x) y = Relu(h) }")
    assert graph.activation_after(graph.value_map(m)["h"]) is None
