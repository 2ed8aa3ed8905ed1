"""Whatever is put together: the file is valid, right, and nothing is dequantized in vain."""

import numpy as np
from emitting import assert_good, kernels, quantized
from helpers import model, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
ONE = [
    "Relu({})",
    "Clip({}, low, high)",
    "Clip({}, pos, high)",
    "LeakyRelu<alpha = 0.2>({})",
    "Sigmoid({})",
    "Tanh({})",
]
ONE += ["MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>({})", "Transpose<perm = [0, 1, 3, 2]>({})", "Mul({}, vec)"]
ONE += ["AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>({})", "Add(vec, {})", "Mul({}, high)", "Softmax({})"]
ONE += ["Conv({}, w1)", "Conv<pads = [1, 1, 1, 1]>({}, w3, vec1)", "Conv<group = 4, pads = [1, 1, 1, 1]>({}, wd)"]
ONE += ["ConvTranspose<pads = [1, 1, 1, 1]>({}, w3)", "MatMul({}, sq)", "Conv<pads = [1, 1, 1, 1], group = 2>({}, wg)"]
TWO = ["Add({}, {})", "Mul({}, {})", "Max({}, {})", "Conv(Concat<axis = 1>({}, {}), w2)"]
CONSTANTS = {
    "low": np.float32(-1),
    "high": np.float32(1),
    "pos": np.float32(0.1),
    "vec": weights(1, 4, 1, 1),
    "vec1": weights(4),
    "w1": weights(4, 4, 1, 1) / 2,
    "w2": weights(4, 8, 1, 1) / 3,
    "w3": weights(4, 4, 3, 3) / 6,
    "wd": weights(4, 1, 3, 3) / 3,
    "wg": weights(4, 2, 3, 3) / 4,
    "sq": weights(6, 6) / 3,
}
STEPS = st.lists(
    st.tuples(st.sampled_from(ONE + TWO), st.integers(1, 4), st.integers(1, 4), st.booleans()), min_size=2, max_size=9
)


def build(steps):
    """A network on [2,4,6,6]: each step reads one or two of the last values; values that are not read are returned."""
    inputs = "".join(
        f", float{'[' + ','.join(map(str, np.shape(array))) + ']' if np.ndim(array) else ''} {name}"
        for name, array in CONSTANTS.items()
    )
    values, body, unread = ["x"], [], {}
    for number, (op, first, second, returned) in enumerate(steps):
        name = f"v{number}"
        reads = [values[-min(first, len(values))], values[-min(second, len(values))]][: op.count("{}")]
        if op.startswith("Conv(Concat"):
            body.append(f"c{number} = Concat<axis = 1>({reads[0]}, {reads[1]})")
            body.append(f"{name} = Conv(c{number}, w2)")
        else:
            body.append(f"{name} = {op.format(*reads)}")
        for value in reads:
            unread.pop(value, None)
        unread[name] = True
        values.append(name)
        if returned and number % 3 == 0:
            unread[f"+{name}"] = True
    outputs = dict.fromkeys(name.removeprefix("+") for name in unread)
    returned = ", ".join(f"float[2,4,6,6] {name}" for name in outputs)
    return model(f"g (float[2,4,6,6] x{inputs}) => ({returned}) {{ {' '.join(body)} }}", **CONSTANTS)


@QUICK
@given(steps=STEPS)
def test_any_small_network(steps):
    m = build(steps)
    feeds = {"x": weights(2, 4, 6, 6, seed=5)}
    plan, _, ran = assert_good(m, feeds, least=6)
    layers = ran.count("QLinearConv") + ran.count("QLinearMatMul") + ran.count("MatMulIntegerToFloat")
    assert layers == len(plan.weights)


@QUICK
@given(
    groups=st.integers(1, 3),
    inputs=st.integers(1, 3),
    outputs=st.integers(1, 3),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    stride=st.integers(1, 2),
    pad=st.integers(0, 1),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
    relu=st.booleans(),
)
def test_any_convolution(groups, inputs, outputs, kernel, stride, pad, dilation, bias, relu):
    rank, channels = len(kernel), groups * outputs
    shape = (2, groups * inputs, *[7] * rank)
    text = f"""g (float[{",".join(map(str, shape))}] x, float[{",".join(map(str, (channels, inputs, *kernel)))}] w,
                  float[{channels}] b, float[{channels},{channels},{",".join("1" * rank)}] u)
        => (float[2,{channels},{",".join("pqr"[:rank])}] y) {{
        h = Conv<group = {groups}, strides = {[stride] * rank}, pads = {[pad] * 2 * rank}, dilations = {[dilation] * rank}>
            (x, w{", b" if bias else ""})
        {"i = Relu(h)" if relu else ""} y = Conv({"i" if relu else "h"}, u)
    }}"""
    spread = np.geomspace(0.01, 10, channels, dtype=np.float32)
    m = model(
        text,
        w=weights(channels, inputs, *kernel) * spread.reshape(-1, *[1] * (rank + 1)),
        b=weights(channels) * spread,
        u=weights(channels, channels, *[1] * rank),
    )
    _, _, ran = assert_good(m, {"x": weights(*shape, seed=5)}, least=20)
    assert ran.count("QLinearConv") == 2


@QUICK
@given(
    rows=st.integers(1, 3),
    rank=st.integers(2, 4),
    inputs=st.integers(1, 6),
    outputs=st.integers(1, 6),
    free=st.booleans(),
)
def test_any_linear_layer(rows, rank, inputs, outputs, free):
    middle = [2, 3][: rank - 2]
    shape = (rows, *middle, inputs)
    dims = ",".join(["n" if free else str(rows), *map(str, middle)])
    text = f"""g (float[{dims},{inputs}] x, float[{inputs},{outputs}] w, float[{outputs}] b)
        => (float[{dims},{outputs}] y) {{ h = MatMul(x, w) i = Add(h, b) y = Tanh(i) }}"""
    m = model(text, w=weights(inputs, outputs), b=weights(outputs))
    _, emitted = quantized(m, {"x": weights(*shape, seed=5)})
    ran = kernels(emitted)
    assert {"QGemm", "MatMulIntegerToFloat"} & set(ran)
    assert not {"Gemm", "FusedGemm", "MatMul"} & set(ran)
