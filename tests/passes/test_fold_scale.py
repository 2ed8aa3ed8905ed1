"""Scales and shifts around layers against the layers that take them, in onnxruntime."""

import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph, runtime
from onnxq.passes.base import apply
from onnxq.passes.fold_scale import FoldScale

NORM = "BatchNormalization<epsilon = 0.1>"
PAD = "pads = [1, 0, 2, 1]"


def build(body, x="N,4,7,6", y="N,A,B,C", low=0.5, high=2.0, **shapes):
    """A model from x to y, with constants of the given shapes, positive and negative but not near zero."""
    constants = {}
    for place, (name, shape) in enumerate(shapes.items()):
        sign = np.sign(weights(*shape, seed=100 + place)).astype(np.float32)
        size = weights(*shape, seed=place, low=low, high=high)
        constants[name] = np.abs(size) if name == "var" else sign * size
    given = "".join(f", float{list(array.shape) if array.ndim else ''} {name}" for name, array in constants.items())
    m = model(f"g (float[{x}] x{given}) => (float[{y}] y) {{ {body} }}", **constants)
    size = [int(n) if n.isdigit() else 3 for n in x.split(",")]
    return m, {"x": weights(*size, seed=50)}


def check(m, feeds, expected, count):
    before = run(m, feeds)
    (applied,) = apply(m, [FoldScale()], feeds)
    assert ops(m) == expected
    assert applied.count == count
    assert applied.gap <= 1e-5
    assert_same_outputs(before, run(m, feeds), rtol=1e-3, atol=1e-3)
    assert FoldScale()(m) == 0


def stays(m, reason, count=1):
    graph.infer_shapes(m)
    before = ops(m)
    assert FoldScale()(m) == 0
    assert ops(m) == before
    found = list(FoldScale().refused(m).values())
    assert len(found) == count
    assert any(reason in text for text in found)


OPERATIONS = ["Mul({x}, c)", "Mul(c, {x})", "Div({x}, c)", "Add({x}, c)", "Add(c, {x})", "Sub({x}, c)", "Sub(c, {x})",
              "Neg({x})"]  # fmt: skip


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (6, 1, 1), (1, 6, 1, 1)])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_behind_a_conv(operation, shape, bias):
    body = f"a = Conv<{PAD}, group = 2, strides = [2, 1]>(x, w{bias}) y = {operation.format(x='a')}"
    given = {"w": (6, 2, 3, 3)} | ({"b": (6,)} if bias else {}) | ({"c": shape} if "c" in operation else {})
    m, feeds = build(body, **given)
    check(m, feeds, ["Conv"], 1)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1), (4, 1, 1), (1, 4, 1, 1)])
@pytest.mark.parametrize("bias", ["", ", b"])
def test_in_front_of_a_conv_without_padding(operation, shape, bias):
    body = f"a = {operation.format(x='x')} y = Conv<group = 2, strides = [2, 1]>(a, w{bias})"
    given = {"w": (6, 2, 3, 3)} | ({"b": (6,)} if bias else {}) | ({"c": shape} if "c" in operation else {})
    m, feeds = build(body, **given)
    check(m, feeds, ["Conv"], 1)


@pytest.mark.parametrize("operation", ["Mul({x}, c)", "Div({x}, c)", "Sub({x}, c)"])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_behind_and_in_front_of_a_transposed_conv(operation, groups):
    outputs = 6 if groups < 4 else 8
    shapes = {"w": (4, outputs // groups, 3, 2), "b": (outputs,), "c": (outputs, 1, 1)}
    attributes = f"{PAD}, group = {groups}, strides = [2, 1]"
    m, feeds = build(f"a = ConvTranspose<{attributes}>(x, w, b) y = {operation.format(x='a')}", **shapes)
    check(m, feeds, ["ConvTranspose"], 1)
    shapes["c"] = (4, 1, 1)
    m, feeds = build(f"a = {operation.format(x='x')} y = ConvTranspose<{attributes}>(a, w, b)", **shapes)
    if "Sub" in operation:
        stays(m, "pads with zeros")
    else:
        check(m, feeds, ["ConvTranspose"], 1)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("shape", [(), (1, 1), "channels"])
@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("front", [False, True])
def test_around_a_gemm(operation, shape, transposed, front):
    shape = ((5,) if front else (3,)) if shape == "channels" else shape
    given = {"w": (3, 5) if transposed else (5, 3), "b": (3,)} | ({"c": shape} if "c" in operation else {})
    gemm = f"Gemm<transB = {transposed}>"
    if front:
        body = f"a = {operation.format(x='x')} y = {gemm}(a, w, b)"
    else:
        body = f"a = {gemm}(x, w, b) y = {operation.format(x='a')}"
    m, feeds = build(body, "N,5", "N,3", **given)
    check(m, feeds, ["Gemm"], 1)


@pytest.mark.parametrize(
    ("body", "expected", "count"),
    [
        ("a = MatMul(x, w) y = Mul(a, c3)", ["MatMul"], 1),
        ("a = MatMul(x, w) y = Div(a, s)", ["MatMul"], 1),
        ("a = MatMul(x, w) d = Add(b, a) y = Sub(s, d)", ["MatMul", "Add"], 1),
        ("a = MatMul(x, w) d = Mul(s, a) y = Add(d, b)", ["MatMul", "Add"], 1),
        ("a = MatMul(x, w) y = Add(a, s)", ["MatMul", "Add"], 1),
        ("a = Mul(c5, x) y = MatMul(a, w)", ["MatMul"], 1),
        ("a = Sub(c5, x) y = MatMul(a, w)", ["MatMul", "Add"], 1),
        ("a = Add(x, c5) d = MatMul(a, w) y = Add(d, b)", ["MatMul", "Add"], 1),
        ("a = Div(x, s) d = Add(a, c5) e = MatMul(d, w) y = Sub(e, c3)", ["MatMul", "Add"], 3),
    ],
)
def test_around_a_matrix_product(body, expected, count):
    shapes = {"w": (5, 3), "b": (3,), "c3": (1, 3), "c5": (5,), "s": (1,)}
    used = {name: shape for name, shape in shapes.items() if f"({name}," in body or f", {name})" in body}
    m, feeds = build(body, "N,T,5", "N,T,3", **used)
    check(m, feeds, expected, count)


def test_a_result_that_is_an_output_keeps_its_name():
    m, feeds = build("a = Add(x, c) y = MatMul(a, w)", "N,T,5", "N,T,3", c=(5,), w=(5, 3))
    check(m, feeds, ["MatMul", "Add"], 1)
    assert [value.name for value in m.graph.outputs] == ["y"]


@pytest.mark.parametrize("attributes", [PAD, "pads = [0, 0, 0, 1]", 'auto_pad = "SAME_UPPER"'])
def test_in_front_of_padding_only_the_factor_goes(attributes):
    m, feeds = build(
        f"a = Sub(x, c) d = Mul(a, s) y = Conv<{attributes}>(d, w)", c=(4, 1, 1), s=(4, 1, 1), w=(6, 4, 3, 3)
    )
    check(m, feeds, ["Sub", "Conv"], 1)
    (reason,) = FoldScale().refused(m).values()
    assert "pads with zeros" in reason


@pytest.mark.parametrize(
    ("chain", "expected", "count"),
    [
        ("a = Mul(x, s) d = Add(a, c)", ["Add", "Conv"], 1),
        ("a = Mul(x, s) d = Sub(a, u)", ["Add", "Conv"], 1),
        ("a = Div(x, s) b = Sub(a, c) e = Div(b, u) d = Sub(s, e)", ["Add", "Conv"], 1),
        ("a = Add(x, c) b = Mul(a, u) e = Add(b, u) d = Neg(e)", ["Add", "Conv"], 2),
        ("a = Add(x, c) b = Neg(a) d = Add(c, b)", ["Conv"], 1),
        (f"a = Div(x, s) d = {NORM}(a, gamma, beta, mean, var)", ["Add", "Conv"], 1),
    ],
)
def test_preprocessing_in_front_of_padding_becomes_one_addition(chain, expected, count):
    shapes = {"s": (), "c": (4, 1, 1), "u": (1, 4, 1, 1)} | dict.fromkeys(("gamma", "beta", "mean", "var"), (4,))
    used = {n: shape for n, shape in shapes.items() if f"({n}," in chain or f" {n})" in chain or f" {n}," in chain}
    m, feeds = build(f"{chain} y = Conv<{PAD}>(d, w)", w=(6, 4, 3, 3), **used)
    check(m, feeds, expected, count)


def test_preprocessing_in_front_of_no_padding_disappears():
    body = f"a = Div(x, s) b = Sub(a, c) e = Div(b, u) d = {NORM}(e, gamma, beta, mean, var) y = Conv(d, w)"
    norm = dict.fromkeys(("gamma", "beta", "mean", "var"), (4,))
    m, feeds = build(body, s=(), c=(4, 1, 1), u=(1, 4, 1, 1), **norm, w=(6, 4, 3, 3))
    check(m, feeds, ["Conv"], 4)


def test_what_several_layers_read_goes_into_all_of_them():
    body = f"a = Mul(x, c) d = Conv<{PAD}>(a, w) e = Conv<group = 2, {PAD}>(a, u, b) y = Add(d, e)"
    m, feeds = build(body, c=(4, 1, 1), w=(6, 4, 3, 3), u=(6, 2, 3, 3), b=(6,))
    check(m, feeds, ["Conv", "Conv", "Add"], 1)
    body = "a = Add(x, c) d = MatMul(a, w) e = Gemm(a, u, b) y = Add(d, e)"
    m, feeds = build(body, "N,5", "N,3", c=(5,), w=(5, 3), u=(5, 3), b=(3,))
    check(m, feeds, ["MatMul", "Add", "Gemm", "Add"], 1)


def test_layers_may_share_a_weight():
    m, feeds = build(
        "a = Conv(x, w) d = Mul(a, c) e = Conv(d, w) y = Relu(e)", x="N,4,7,6", c=(4, 1, 1), w=(4, 4, 1, 1)
    )
    shared = graph.constant(m.graph.initializers["w"]).copy()
    before = run(m, feeds)
    graph.infer_shapes(m)
    assert FoldScale()(m) == 1
    assert_same_outputs(before, run(m, feeds))
    np.testing.assert_array_equal(graph.constant(m.graph.initializers["w"]), shared)


WEIGHTS = {"w": (6, 4, 3, 3)}
REFUSALS = {
    "has another reader": ("a = Conv(x, w) d = Mul(a, c) e = Relu(a) y = Add(d, e)", WEIGHTS | {"c": (6, 1, 1)}),
    "varies along other axes": ("a = Conv(x, w) y = Mul(a, c)", WEIGHTS | {"c": (4,)}),
    "along other axes than": ("a = Conv(x, w) y = Mul(a, c)", WEIGHTS | {"c": (6, 5, 4)}),
    "may add axes": ("a = Conv(x, w) y = Mul(a, c)", WEIGHTS | {"c": (1, 1, 1, 1, 1)}),
    "6 channels instead of 1": ("a = Conv(x, w) y = Mul(a, c)", {"w": (1, 4, 3, 3), "c": (6, 1, 1)}),
    "pads with zeros": (f"a = Add(x, c) y = Conv<{PAD}>(a, w)", WEIGHTS | {"c": (4, 1, 1)}),
    "cannot take it": ("a = Add(x, c) d = Conv(a, w) e = Relu(a) f = Conv(e, w) y = Add(d, f)", WEIGHTS | {"c": ()}),
    "divides by what is computed": ("a = Div(c, x) y = Conv(a, w)", WEIGHTS | {"c": ()}),
    "not known, or smaller": ("a = Mul(x, c) y = Conv(a, w)", WEIGHTS | {"c": (4, 1, 1)}),
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_refusals_say_why(reason):
    body, shapes = REFUSALS[reason]
    m, _ = build(body, **({"x": "N,1,7,6"} if "smaller" in reason else {}), **shapes)
    stays(m, reason)


def test_more_refusals():
    m, _ = build(f"a = {NORM}(x, gamma, beta, mean, var) y = Conv<{PAD}>(a, w)", w=(6, 4, 3, 3),
                 gamma=(4,), beta=(4,), mean=(4,), var=(4,))  # fmt: skip
    stays(m, "pads with zeros")
    m, _ = build(
        "a = Sub(x, c) d = MatMul(a, w) e = MatMul(a, u) y = Add(d, e)", "N,T,5", "N,T,3", c=(5,), w=(5, 3), u=(5, 3)
    )
    stays(m, "would each need an Add")
    m, _ = build("a = Mul(x, s) d = MatMul(a, w) e = Conv(a, u) f = Add(d, s) y = Add(e, f)", "1,4,4,4", "1,4,4,4",
                 s=(), w=(4, 4), u=(4, 4, 1, 1))  # fmt: skip
    before = run(m, {"x": weights(1, 4, 4, 4)})
    assert FoldScale()(m) == 1  # only the sum behind the MatMul
    assert list(FoldScale().refused(m).values()) == ["the layers that read it take their channels from different axes"]
    assert_same_outputs(before, run(m, {"x": weights(1, 4, 4, 4)}))


def test_a_zero_or_tiny_factor_in_front_of_padding_keeps_its_shift():
    for factor in (0.0, 1e-4):
        m, feeds = build(f"a = Mul(x, s) d = Add(a, c) y = Conv<{PAD}>(d, w)", s=(4, 1, 1), c=(4, 1, 1), w=(6, 4, 3, 3))
        array = graph.constant(m.graph.initializers["s"]).copy()
        array[2] = factor
        graph.replace_constant(m, m.graph[0], 1, array)
        graph.infer_shapes(m)
        before = run(m, feeds)
        assert FoldScale()(m) == 0
        assert_same_outputs(before, run(m, feeds))


GELUS = [
    "d = Div(a, root) e = Erf(d) f = Add(e, one) g = Mul(a, f) h = Mul(g, half)",
    "s = Mul(a, half) d = Div(a, root) e = Erf(d) f = Add(e, one) h = Mul(s, f)",
]


@pytest.mark.parametrize("gelu", GELUS)
def test_the_half_of_a_gelu_stays_where_it_is_known(gelu):
    """With the half in the weights behind, neither a pass nor the runtime would find the GELU."""
    m, feeds = build(f"a = MatMul(x, w) {gelu} k = Mul(h, c) y = MatMul(k, v)", "N,T,5", "N,T,3", w=(5, 4), v=(4, 3),
                     root=(), one=(), half=(), c=())  # fmt: skip
    for name, number in {"root": 2**0.5, "one": 1.0, "half": 0.5}.items():
        graph.set_initializer(m, name, np.asarray(number, np.float32))
    chain = ["Div", "Erf", "Add", "Mul", "Mul"] if gelu is GELUS[0] else ["Mul", "Div", "Erf", "Add", "Mul"]
    check(m, feeds, ["MatMul", *chain, "MatMul"], 1)
    assert FoldScale().refused(m) == {}
    assert "Gelu" in [node.op_type for node in runtime.optimized(m).graph]


TANH = ("p = Mul(a, a) q = Mul(p, a) r = Mul(q, cubic) s = Add(a, r) t = Mul(s, slope) u = Tanh(t) e = Add(u, one) "
        "f = Mul(a, e) h = Mul(f, half)")  # fmt: skip


@pytest.mark.parametrize(("opset", "held"), [(17, False), (20, True)])
def test_the_half_of_a_gelu_by_tanh_stays_where_an_operator_takes_it(opset, held):
    numbers = {"cubic": 0.044715, "slope": 0.7978846, "one": 1.0, "half": 0.5}
    constants = {name: np.float32(number) for name, number in numbers.items()} | {
        "w": weights(5, 4),
        "v": weights(4, 3),
    }
    inputs = "float[n,5] x, float[5,4] w, float[4,3] v, float cubic, float slope, float one, float half"
    m = model(f"g ({inputs}) => (float[n,3] y) {{ a = MatMul(x, w) {TANH} y = MatMul(h, v) }}", opset, **constants)
    graph.infer_shapes(m)
    assert FoldScale()(m) == (not held)


def test_a_gelu_in_front_of_padding_is_no_part_of_a_sequence():
    m, _ = build(f"a = Conv(x, w) {GELUS[0]} k = Add(h, c) y = Conv<{PAD}>(k, v)", w=(6, 4, 3, 3), v=(6, 6, 3, 3),
                 root=(), one=(), half=(), c=(6, 1, 1))  # fmt: skip
    for name, number in {"root": 2**0.5, "one": 1.0, "half": 0.5}.items():
        graph.set_initializer(m, name, np.asarray(number, np.float32))
    assert FoldScale()(m) == 0
    assert "Gelu" in [node.op_type for node in runtime.optimized(m).graph]


def test_an_overflow_is_refused():
    m, _ = build("a = Conv(x, w) y = Mul(a, c)", w=(6, 4, 3, 3), c=())
    for index, node in enumerate(m.graph):
        graph.replace_constant(m, node, 1, np.full_like(graph.constant(node.inputs[1]), 1e30 + index))
    stays(m, "too large for float32")


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_sequence_around_a_conv(data):
    """Random scales and shifts on both sides of a Conv: the value stays, and so does the number of nodes needed."""
    padded, group = data.draw(st.booleans()), data.draw(st.sampled_from([1, 2]))
    shapes, lines, last = {"w": (6, 4 // group, 3, 3)}, [], "x"
    for side, channels in (("f", 4), ("b", 6)):
        for place in range(data.draw(st.integers(0, 3))):
            kind = data.draw(st.sampled_from(OPERATIONS[:-1]))
            name = f"{side}{place}"
            shapes[f"c{name}"] = data.draw(st.sampled_from([(), (1, 1), (channels, 1, 1), (1, channels, 1, 1)]))
            lines.append(f"{name} = {kind.replace('c', f'c{name}').format(x=last)}")
            last = name
        if side == "f":
            lines.append(f"conv = Conv<group = {group}{', ' + PAD if padded else ''}>({last}, w)")
            last = "conv"
    lines.append(f"y = Relu({last})")
    m, feeds = build(" ".join(lines), **shapes)
    before = run(m, feeds)
    (applied,) = apply(m, [FoldScale()], feeds)
    assert applied.gap <= 1e-5
    assert ops(m)[-2:] == ["Conv", "Relu"]
    assert len(ops(m)) <= 2 + padded
    assert_same_outputs(before, run(m, feeds), rtol=1e-2, atol=1e-2)
    assert FoldScale()(m) == 0
