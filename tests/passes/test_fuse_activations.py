import re

import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights

from onnxq import graph
from onnxq.passes import apply
from onnxq.passes.fuse_activations import FuseActivations

X = weights(4, 6, low=-8, high=8)
NUMBERS = {
    "zero": 0.0,
    "half": 0.5,
    "one": 1.0,
    "two": 2.0,
    "three": 3.0,
    "four": 4.0,
    "five": 5.0,
    "six": 6.0,
    "sixth": 1 / 6,
    "minus": -1.0,
}
GATE = "a = Add(x, three) b = Clip(a, zero, six)"


def made(body, opset=17, outputs="float[n,6] y", **changed):
    used = {name: value for name, value in (NUMBERS | changed).items() if re.search(rf"\b{name}\b", body)}
    numbers = {name: np.float32(value) for name, value in used.items()}
    declared = "".join(f", float {name}" for name in numbers)
    loaded = model(f"g (float[n,6] x{declared}) => ({outputs}) {{ {body} }}", opset=opset, **numbers)
    graph.infer_shapes(loaded)
    return loaded


def becomes(body, expected, **changed):
    m = made(body, **changed)
    before = run(m, {"x": X})
    assert apply(m, [FuseActivations()], {"x": X})[0].count == 1
    assert ops(m) == expected
    assert_same_outputs(before, run(m, {"x": X}), atol=2e-6)
    assert FuseActivations()(m) == 0
    return m


@pytest.mark.parametrize(
    "body",
    [
        f"{GATE} c = Mul(x, b) y = Div(c, six)",
        f"{GATE} c = Div(b, six) y = Mul(c, x)",
        f"{GATE} c = Div(x, six) y = Mul(c, b)",
        "a = Add(three, x) r = Relu(a) b = Min(six, r) c = Mul(b, sixth) y = Mul(x, c)",
        "a = Sub(x, minus) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six)",
        "d = Div(x, six) a = Add(d, half) b = Clip(a, zero, one) y = Mul(x, b)",
    ],
)
def test_hard_swish(body):
    becomes(body, ["HardSwish"], minus=-3.0)


@pytest.mark.parametrize(
    ("body", "alpha", "beta"),
    [
        (f"{GATE} y = Div(b, six)", 1 / 6, 0.5),
        ("a = Add(x, three) r = Relu(a) b = Min(r, six) y = Mul(sixth, b)", 1 / 6, 0.5),
        ("d = Div(x, five) a = Add(d, half) y = Clip(a, zero, one)", 0.2, 0.5),
        ("d = Mul(x, two) a = Add(d, one) b = Clip(a, zero, four) y = Div(b, four)", 0.5, 0.25),
        ("a = Sub(three, x) b = Clip(a, zero, six) y = Div(b, six)", -1 / 6, 0.5),
    ],
)
def test_hard_sigmoid(body, alpha, beta):
    m = becomes(body, ["HardSigmoid"])
    assert graph.attribute(m.graph[0], "alpha", 0.0) == pytest.approx(alpha, rel=1e-5)
    assert graph.attribute(m.graph[0], "beta", 0.0) == pytest.approx(beta, rel=1e-5)


def test_a_hard_gate_of_another_tensor_becomes_hard_sigmoid():
    m = becomes(f"t = Exp(x) {GATE} c = Div(b, six) y = Mul(t, c)", ["Exp", "HardSigmoid", "Mul"])
    assert graph.attribute(next(graph.nodes(m, "HardSigmoid")), "alpha", 0.0) == pytest.approx(1 / 6)


def test_a_hard_gate_of_a_square():
    body = "p = Mul(x, x) q = Sub(x, p) a = Add(q, three) b = Clip(a, zero, six) y = Div(b, six)"
    becomes(body, ["Mul", "Sub", "HardSigmoid"])


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("a = Neg(x) e = Exp(a) d = Add(e, one) y = Div(x, d)", ["Sigmoid", "Mul"]),
        ("a = Mul(minus, x) e = Exp(a) d = Add(one, e) y = Div(one, d)", ["Sigmoid"]),
        ("a = Neg(x) e = Exp(a) d = Add(e, one) s = Div(one, d) y = Mul(x, s)", ["Sigmoid", "Mul"]),
        ("t = Abs(x) a = Neg(x) e = Exp(a) d = Add(e, one) y = Div(t, d)", ["Abs", "Sigmoid", "Mul"]),
        ("a = Neg(x) e = Exp(a) d = Add(e, one) y = Div(three, d)", ["Sigmoid", "Mul"]),
    ],
)
def test_sigmoid(body, expected):
    becomes(body, expected)


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        (f"{GATE} c = Mul(x, b) y = Div(c, six)", {"three": 2.9, "zero": -0.1}),
        (f"{GATE} c = Mul(x, b) y = Div(c, six)", {"zero": -0.1}),
        (f"{GATE} c = Mul(b, x) y = Div(six, c)", {}),
        ("a = Add(x, three) r = Relu(a) b = Min(r, six, x) y = Div(b, six)", {}),
        (f"{GATE} y = Div(b, half)", {}),
        ("a = Add(x, three) r = Relu(a) b = Min(r, x) y = Div(b, six)", {}),
        ("a = Mul(x, x) b = Clip(a, zero, six) y = Div(b, six)", {}),
        ("e = Exp(x) d = Add(e, one) y = Div(x, d)", {}),
        ("a = Neg(x) e = Exp(a) d = Add(e, two) y = Div(x, d)", {}),
        ("a = Neg(x) e = Exp(a) d = Add(e, one) y = Div(d, x)", {}),
        ("a = Neg(x) e = Exp(a) d = Add(e, one) y = Div(e, d)", {}),
    ],
)
def test_other_arithmetic_stays(body, changed):
    m = made(body, **changed)
    before = ops(m)
    assert FuseActivations()(m) == 0
    assert ops(m) == before
    assert FuseActivations().refused(m) == {}


@pytest.mark.parametrize(("tail", "op"), [("y = Mul(c, x)", "HardSwish"), ("y = Neg(c)", "HardSigmoid")])
def test_chains_that_run_in_integers_stay(tail, op):
    m = made(f"{GATE} c = Mul(b, sixth) {tail}")
    assert FuseActivations()(m) == 0
    (reason,) = FuseActivations().refused(m).values()
    assert f"faster than {op}" in reason


def test_hard_swish_of_other_slopes_is_none():
    m = made(f"{GATE} c = Mul(x, b) y = Div(c, six)", three=2.9)
    assert FuseActivations()(m) == 0


def test_an_older_opset_has_no_hard_swish():
    m = made(f"{GATE} c = Mul(x, b) y = Div(c, six)", opset=13)
    assert FuseActivations()(m) == 0
    assert list(FuseActivations().refused(m).values()) == ["opset 13 has no HardSwish"]


@pytest.mark.parametrize(
    ("body", "inner"),
    [
        (f"{GATE} c = Mul(x, b) y = Div(c, six)", "a"),
        (f"{GATE} y = Div(b, six)", "b"),
        ("a = Neg(x) e = Exp(a) d = Add(e, one) y = Div(x, d)", "e"),
    ],
)
def test_inner_values_with_another_reader_are_refused(body, inner):
    for ending, outputs in ((f"{body} z = Abs({inner})", "z"), (body, inner)):
        m = made(ending, outputs=f"float[n,6] y, float[n,6] {outputs}")
        assert FuseActivations()(m) == 0
        (reason,) = FuseActivations().refused(m).values()
        assert reason.endswith("inside it is read elsewhere, too")
