import re

import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights

from onnxq import graph
from onnxq.passes import apply
from onnxq.passes.fuse_gelu import FuseGelu

X = weights(3, 5, low=-4, high=4)
NUMBERS = {
    "half": 0.5,
    "one": 1.0,
    "two": 2.0,
    "three": 3.0,
    "root": 1.4142135,
    "over": 0.70710678,
    "cubic": 0.044715,
    "slope": 0.7978846,
    "slope_cubic": 0.0356774,
    "minus": -1.0,
}
ERF = [
    "a = Div(x, root) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, half)",
    "a = Mul(x, over) b = Erf(a) c = Add(one, b) d = Mul(half, c) y = Mul(d, x)",
    "h = Mul(half, x) a = Div(x, root) b = Erf(a) c = Add(b, one) y = Mul(h, c)",
    "a = Div(x, root) b = Erf(a) c = Mul(b, half) d = Add(c, half) y = Mul(x, d)",
    "h = Div(x, two) a = Div(x, root) b = Erf(a) c = Mul(h, b) y = Add(c, h)",
    "a = Div(x, root) b = Erf(a) c = Sub(b, minus) d = Mul(x, c) y = Div(d, two)",
]
TANH = [
    "a = Pow(x, three) b = Mul(a, cubic) c = Add(x, b) d = Mul(c, slope) t = Tanh(d) e = Add(t, one) f = Mul(x, e) "
    "y = Mul(f, half)",
    "p = Mul(x, x) a = Mul(p, x) b = Mul(cubic, a) c = Add(b, x) d = Mul(slope, c) t = Tanh(d) e = Add(one, t) "
    "h = Mul(x, half) y = Mul(h, e)",
    "q = Mul(slope, x) p = Pow(x, two) a = Mul(cubic, p) b = Add(a, one) c = Mul(q, b) t = Tanh(c) e = Add(t, one) "
    "f = Mul(e, half) y = Mul(x, f)",
    "l = Mul(slope, x) a = Pow(x, three) b = Mul(slope_cubic, a) c = Add(l, b) t = Tanh(c) e = Add(t, one) "
    "h = Mul(x, half) y = Mul(h, e)",
]


def made(body, opset=20, outputs="float[n,5] y", **changed):
    used = {name: value for name, value in (NUMBERS | changed).items() if re.search(rf"\b{name}\b", body)}
    numbers = {name: np.float32(value) for name, value in used.items()}
    declared = "".join(f", float {name}" for name in numbers)
    loaded = model(f"g (float[n,5] x{declared}) => ({outputs}) {{ {body} }}", opset=opset, **numbers)
    graph.infer_shapes(loaded)
    return loaded


@pytest.mark.parametrize(("body", "approximate"), [(b, "none") for b in ERF] + [(b, "tanh") for b in TANH])
def test_every_order_of_the_factors_becomes_gelu(body, approximate):
    m = made(body)
    before = run(m, {"x": X})
    assert apply(m, [FuseGelu()], {"x": X})[0].count == 1
    assert ops(m) == ["Gelu"]
    assert graph.attribute(m.graph[0], "approximate", "none") == approximate
    assert_same_outputs(before, run(m, {"x": X}), atol=1e-6)
    assert FuseGelu()(m) == 0


def test_a_gelu_between_other_arithmetic_is_found():
    body = "i = Mul(x, two) a = Div(i, root) b = Erf(a) c = Add(b, one) d = Mul(i, c) e = Mul(d, half) "
    m = made(f"{body} y = Add(e, three)")
    before = run(m, {"x": X})
    assert FuseGelu()(m) == 1
    graph.remove_unused(m)
    assert ops(m) == ["Mul", "Gelu", "Add"]
    assert_same_outputs(before, run(m, {"x": X}))


@pytest.mark.parametrize("body", [ERF[0], TANH[0]])
def test_an_older_opset_is_refused_once_per_chain(body):
    m = made(body, opset=17)
    assert FuseGelu()(m) == 0
    assert FuseGelu().refused(m) == {str(graph.producer(m.graph.outputs[0]).name): "opset 17 has no Gelu"}


@pytest.mark.parametrize(
    ("body", "changed"),
    [
        (ERF[0], {"root": 1.42}),
        (ERF[0], {"half": 0.499}),
        (ERF[0], {"one": 1.002}),
        (TANH[0], {"cubic": 0.0448}),
        (TANH[0], {"slope": 0.7988}),
        (TANH[0], {"three": 2.0}),
        (TANH[0].replace("Tanh", "Erf"), {}),
        (ERF[0].replace("Erf", "Tanh"), {}),
        (ERF[0].replace("Div(x, root)", "Div(root, x)"), {}),
        (ERF[0].replace("a = Div(x, root)", "e = Mul(x, over) a = Div(e, x)"), {}),
    ],
)
def test_other_constants_and_functions_are_no_gelu(body, changed):
    m = made(body, **changed)
    assert FuseGelu()(m) == 0
    assert FuseGelu().refused(m) == {}


def test_rounded_constants_are_gelu():
    m = made(ERF[0], root=1.4143)
    assert FuseGelu()(m) == 1


def test_an_inner_value_with_another_reader_is_refused():
    m = made(ERF[0] + " z = Neg(c)", outputs="float[n,5] y, float[n,5] z")
    assert FuseGelu()(m) == 0
    (reason,) = FuseGelu().refused(m).values()
    assert reason.endswith("inside it is read elsewhere, too")


def test_an_inner_output_of_the_model_is_refused():
    m = made(ERF[0], outputs="float[n,5] y, float[n,5] b")
    assert FuseGelu()(m) == 0
    assert len(FuseGelu().refused(m)) == 1


def test_constants_that_widen_the_result_are_left():
    body = "a = Div(x, root) b = Erf(a) c = Add(b, one) d = Mul(x, c) y = Mul(d, wide)"
    numbers = {name: np.float32(NUMBERS[name]) for name in ("root", "one")}
    text = f"g (float[n,5] x, float root, float one, float[1,1,1] wide) => (float[a,n,5] y) {{ {body} }}"
    m = model(text, opset=20, wide=np.full((1, 1, 1), 0.5, np.float32), **numbers)
    assert FuseGelu()(m) == 0


def test_constants_of_one_element_in_a_vector_are_read():
    numbers = {name: np.full(1, NUMBERS[name], np.float32) for name in ("root", "one", "half")}
    declared = "".join(f", float[1] {name}" for name in numbers)
    m = model(f"g (float[n,5] x{declared}) => (float[n,5] y) {{ {ERF[0]} }}", opset=20, **numbers)
    assert FuseGelu()(m) == 1


def test_doubly_growing_sums_take_no_time():
    body = "t0 = Add(one, one) " + " ".join(f"t{i + 1} = Add(t{i}, t{i})" for i in range(60))
    body += " a = Add(x, t60) y = Erf(a)"
    assert FuseGelu()(made(body)) == 0
