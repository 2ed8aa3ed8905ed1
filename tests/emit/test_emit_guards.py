"""Integer linear layers whose result is read in float, moved or clipped: the runtime must still fuse them."""

import numpy as np
import pytest
from emitting import assert_good, stored
from helpers import model, weights

LAYERS = {"MatMul and bias": "g0 = MatMul(x, w) h = Add(b, g0)", "Gemm": "h = Gemm(x, w)"}
ACTIVATIONS = {
    "none": "",
    "Relu": "i = Relu(h)",
    "Clip": "i = Clip(h, low, high)",
    "Clip without 0": "i = Clip(h, half, high)",
    "two": "g1 = Clip(h, half, high) i = Relu(g1)",
}
READERS = {
    "nobody": ("", "i"),
    "float": ("y = Tanh(i)", "y"),
    "two floats": ("y = Tanh(i) z = Exp(i)", "y, z"),
    "float and output": ("y = Tanh(i)", "y, i"),
    "integers": ("y = MatMul(i, w)", "y"),
    "both": ("y = MatMul(i, w) z = Tanh(i)", "y, z"),
    "integers and output": ("y = MatMul(i, w)", "y, i"),
    "float before": ("y = MatMul(i, w) z = Tanh(h)", "y, z"),
    "output before": ("y = MatMul(i, w)", "y, h"),
    "moved": ("j = Reshape(i, shape) y = MatMul(j, w)", "y"),
    "moved in float": ("j = Reshape(i, shape) y = Tanh(j)", "y"),
    "moved for both": ("j = Transpose(i) y = MatMul(j, w) z = Tanh(j)", "y, z"),
    "moved, float before": ("j = Reshape(i, shape) y = MatMul(j, w) z = Tanh(h)", "y, z"),
    "moved, integers before": ("j = Reshape(i, shape) y = MatMul(j, w) z = MatMul(i, w)", "y, z"),
}
CONSTANTS = {
    "w": weights(6, 6),
    "b": weights(6),
    "low": np.float32(0),
    "half": np.float32(0.5),
    "high": np.float32(2),
    "shape": np.asarray([0, -1]),
}


def case(layer, activation, readers):
    body, wanted = READERS[readers]
    text = f"{LAYERS[layer]} {ACTIVATIONS[activation]} {body}"
    names = dict.fromkeys(wanted.split(", "))
    if activation == "none":  # i is h
        text = text.replace("(i", "(h")
        names = dict.fromkeys("h" if name == "i" else name for name in names)
    outputs = ", ".join(f"float[6,6] {name}" for name in names)
    inputs = "float[6,6] x, float[6,6] w, float[6] b, float low, float half, float high, int64[2] shape"
    return model(f"g ({inputs}) => ({outputs}) {{ {text} }}", **CONSTANTS)


@pytest.mark.parametrize("readers", READERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_linear_layer_is_an_integer_kernel_whatever_reads_it(layer, activation, readers):
    plan, _, ran = assert_good(case(layer, activation, readers), {"x": weights(6, 6, seed=5)}, least=10)
    assert not {"Gemm", "FusedGemm", "MatMul", "FusedMatMul"} & set(ran)
    assert sum(ran.count(op) for op in ("QGemm", "QLinearMatMul", "MatMulIntegerToFloat")) == len(plan.weights)


@pytest.mark.parametrize(
    ("activation", "readers"),
    [
        ("none", "nobody"),
        ("none", "float"),
        ("none", "integers"),
        ("none", "moved"),
        ("Relu", "nobody"),
        ("Relu", "two floats"),
        ("Relu", "integers"),
        ("Relu", "both"),
        ("Relu", "moved"),
        ("Clip", "integers"),
    ],
)
def test_no_copy_where_the_runtime_fuses_anyway(activation, readers):
    plan, _, ran = assert_good(case("Gemm", activation, readers), {"x": weights(6, 6, seed=5)}, least=10)
    assert plan.guards == ()
    assert "Sum" not in ran


@pytest.mark.parametrize("behind", ["y = Transpose(h)", "y = Sum(h, x)"])
def test_a_bare_gemm_gets_a_bias_of_zeros(behind):
    """Without one, the runtime fuses it with what stands behind it, into a Gemm without an integer kernel."""
    text = f"g (float[6,6] x, float[6,6] w) => (float[6,6] y) {{ [n] h = Gemm(x, w) {behind} }}"
    _, emitted, ran = assert_good(model(text, w=weights(6, 6)), {"x": weights(6, 6, seed=5)})
    assert stored(emitted, "n.bias_q").tolist() == [0] * 6
    assert "QGemm" in ran
