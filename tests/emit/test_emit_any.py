"""Whatever is put together: the file is valid, right, and nothing is dequantized in vain."""

import re

import numpy as np
from emitting import assert_good, kernels, quantized
from helpers import model, weights
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
PICTURE = """Relu({}) | Clip({}, low, high) | Clip({}, pos, high) | LeakyRelu<alpha = 0.2>({}) | Sigmoid({}) | Tanh({})
    | MaxPool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>({}) | Transpose<perm = [0, 1, 3, 2]>({}) | Mul({}, vec)
    | AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>({}) | Add(vec, {}) | Mul({}, high) | Softmax({})
    | Conv({}, w1) | Conv<pads = [1, 1, 1, 1]>({}, w3, bias) | Conv<group = 4, pads = [1, 1, 1, 1]>({}, wd)
    | ConvTranspose<pads = [1, 1, 1, 1]>({}, w3) | MatMul({}, sq) | Conv<pads = [1, 1, 1, 1], group = 2>({}, wg)
    | Add({}, {}) | Mul({}, {}) | Max({}, {}) | Conv(Concat<axis = 1>({}, {}), w2)"""
LINEAR = """Relu({}) | Clip({}, low, high) | Clip({}, pos, high) | LeakyRelu<alpha = 0.2>({}) | Gelu({}) | Tanh({})
    | LayerNormalization({}, row) | Softmax({}) | Transpose({}) | Reshape({}, shape) | Add({}, row) | Add(square, {})
    | Mul({}, row) | Mul({}, high) | Gemm({}, square) | Gemm<transB = 1>({}, square, row) | MatMul({}, square)
    | Add(MatMul({}, square), row) | Add({}, {}) | Mul({}, {}) | MatMul({}, {}) | Max({}, {})
    | Gemm(Concat<axis = 1>({}, {}), tall, row)"""
SEQUENCE = "|".join(op for op in LINEAR.split("|") if not re.search("Gemm|Transpose|Reshape", op))
CONSTANTS = {
    "low": np.float32(-1),
    "high": np.float32(1.5),
    "pos": np.float32(0.1),
    "vec": weights(1, 4, 1, 1),
    "bias": weights(4),
    "w1": weights(4, 4, 1, 1) / 2,
    "w2": weights(4, 8, 1, 1) / 3,
    "w3": weights(4, 4, 3, 3) / 6,
    "wd": weights(4, 1, 3, 3) / 3,
    "wg": weights(4, 2, 3, 3) / 4,
    "sq": weights(6, 6) / 3,
    "row": weights(6, low=0.5, high=1.5),
    "square": weights(6, 6, seed=1) / 2,
    "tall": weights(12, 6) / 3,
    "shape": np.asarray([0, -1]),
}


def steps(operators):
    """Operators, how far back each finds its operands, and whether it is returned though it is read."""
    names = st.sampled_from([" ".join(op.split()) for op in operators.split("|")])
    return st.lists(st.tuples(names, st.integers(1, 4), st.integers(1, 4), st.booleans()), min_size=2, max_size=9)


def build(steps, shape):
    """A network on tensors of one shape: values that are not read, and some that are, are returned."""
    declared = "".join(
        f", {'int64' if array.dtype == np.int64 else 'float'}{list(array.shape) if array.ndim else ''} {name}"
        for name, array in CONSTANTS.items()
    )
    values, body, outputs = ["x"], [], {}
    for number, (op, first, second, returned) in enumerate(steps):
        name = f"v{number}"
        reads = [values[-min(back, len(values))] for back in (first, second)][: op.count("{}")]
        text = op.format(*reads)
        while (inner := re.search(r"\((\w+(?:<[^>]*>)?\([^()]*\))", text)) is not None:  # one operator per line
            body.append(f"{name}in = {inner[1]}")
            text = text.replace(inner[1], f"{name}in")
        body.append(f"{name} = {text}")
        for value in reads:
            if not outputs.get(value):
                outputs.pop(value, None)
        outputs[name] = returned and number % 3 == 0
        values.append(name)
    wanted = ", ".join(f"float{list(shape)} {name}" for name in outputs)
    return model(f"g (float{list(shape)} x{declared}) => ({wanted}) {{ {' '.join(body)} }}", 20, **CONSTANTS)


def assert_network(made, shape):
    plan, _, ran = assert_good(made, {"x": weights(*shape, seed=5)}, least=3)
    kinds = ("QLinearConv", "QLinearMatMul", "MatMulIntegerToFloat", "QGemm")
    assert sum(ran.count(kind) for kind in kinds) >= len(plan.weights)


@QUICK
@given(steps=steps(PICTURE))
def test_any_small_network_on_pictures(steps):
    assert_network(build(steps, (2, 4, 6, 6)), (2, 4, 6, 6))


@QUICK
@given(steps=steps(LINEAR))
def test_any_small_network_of_linear_layers(steps):
    assert_network(build(steps, (6, 6)), (6, 6))


@QUICK
@given(steps=steps(SEQUENCE))
def test_any_small_network_on_sequences(steps):
    assert_network(build(steps, (2, 6, 6)), (2, 6, 6))


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
        h = Conv<group = {groups}, strides = {[stride] * rank}, pads = {[pad] * 2 * rank},
                 dilations = {[dilation] * rank}>(x, w{", b" if bias else ""})
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
