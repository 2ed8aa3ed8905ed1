import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights

from onnxq import graph
from onnxq.passes import FoldConstants

X = {"x": weights(2, 4, seed=3)}
W, V = weights(4, 3, seed=1), weights(3, 4, seed=2)


def build(body, output="float[a,b] y", opset=17, **constants):
    return model(
        f"g (float[N,4] x, float[4,3] w, float[3,4] v) => ({output}) {{ {body} }}",
        opset=opset,
        w=W,
        v=V,
        **constants,
    )


def test_a_constant_subgraph_becomes_one_initializer():
    m = build(
        """one = Constant<value = float[1] {1.5}>() t = Transpose(v) s = Mul(t, one) q = Sqrt(s) z = Abs(s)
           y = MatMul(x, z)"""
    )
    before = run(m, X)
    assert FoldConstants()(m) == 4 + 1  # Sqrt is dead, and goes with the others
    assert ops(m) == ["MatMul"]
    graph.remove_unused(m)
    assert list(m.graph.initializers) == ["z"]
    np.testing.assert_allclose(graph.constant(m.graph.initializers["z"]), np.abs(V.T * 1.5))
    assert_same_outputs(before, run(m, X), rtol=0, atol=0)
    assert FoldConstants()(m) == 0
    assert FoldConstants().refused(m) == {}


def test_values_read_in_several_places_and_in_bodies():
    m = model(
        """g (float[2,4] x, float[4] w, bool c) => (float[2,4] y, float[2,4] z) {
            n = Neg(w) m = Abs(n)
            y = If(c)<then_branch = t () => (float[2,4] a) { a = Add(x, m) },
                      else_branch = e () => (float[2,4] b) { b = Mul(x, n) }>
            z = Sub(x, n)
        }""",
        w=weights(4),
    )
    for condition in (True, False):
        feeds = X | {"c": np.array(condition)}
        copy = m.clone()
        assert FoldConstants()(copy) == 2
        assert ops(copy) == ["If", "Sub"]
        assert_same_outputs(run(m, feeds), run(copy, feeds), rtol=0, atol=0)


def test_a_folded_shape_makes_the_next_result_known():
    m = build(
        """two = Constant<value = int64[1] {2}>() s = Shape(w) r = ReduceMax<keepdims = 1>(s)
           d = Concat<axis = 0>(two, r) o = ConstantOfShape<value = float[1] {0.5}>(d) y = Add(x, o)"""
    )
    before = run(m, X)
    FoldConstants()(m)
    assert ops(m) == ["Add"]
    assert_same_outputs(before, run(m, X), rtol=0, atol=0)


@pytest.mark.parametrize(("code", "dtype"), [(10, "float16"), (11, "float64"), (3, "int8"), (4, "uint16"), (9, "bool")])
def test_keeps_the_element_type(code, dtype):
    m = build(
        f"a = Abs(v) k = Cast<to = {code}>(a) p = Abs(x) g = Cast<to = {code}>(p) c = Concat<axis = 0>(g, k) "
        "y = Cast<to = 1>(c)"
    )
    before = run(m, X)
    assert FoldConstants()(m) == 2
    assert graph.constant(m.graph.initializers["k"]).dtype == dtype
    assert_same_outputs(before, run(m, X), rtol=0, atol=0)


REFUSED = {
    "is random": "r = RandomNormalLike(v) y = MatMul(x, r)",
    "Dropout is random": "d, k = Dropout(v) y = MatMul(x, d)",
    "DequantizeLinear is kept": """s = Constant<value = float {0.5}>() k = Cast<to = 3>(v)
        d = DequantizeLinear(k, s) y = MatMul(x, d)""",
    "has a body": """t = Constant<value = bool {1}>()
        d = If(t)<then_branch = a () => (float[3,4] p) { p = Neg(v) },
                  else_branch = b () => (float[3,4] q) { q = Abs(v) }> y = MatMul(x, d)""",
    "would take 16 MiB": """s = Constant<value = int64[2] {2048, 2048}>() d = ConstantOfShape(s)
        m = ReduceSum<keepdims = 0>(d) y = Add(x, m)""",
    "an output of the model": "z = Neg(v) y = MatMul(x, z)",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_says_why_it_stays(reason):
    m = build(
        REFUSED[reason].replace("MatMul(x, ", "Gemm<transB = 1>(x, "),
        "float[a,b] y" + (", float[c,d] z" if "z =" in REFUSED[reason] else ""),
    )
    fold = FoldConstants(max_bytes=1 << 20)
    fold(m)
    assert "Constant" not in ops(m)
    before = ops(m)
    assert fold(m) == 0
    assert ops(m) == before
    assert len(before) > 1
    assert [reason in text for text in fold.refused(m).values()] == [True]


def test_a_large_result_is_made_when_its_inputs_are_as_large():
    m = build(
        "t = Transpose(v) c = Concat<axis = 0>(t, w) y = MatMul(x, t) z = Shape(c)",
        "float[a,b] y, int64[2] z",
    )
    assert FoldConstants(max_bytes=8)(m) == 2
    assert ops(m) == ["MatMul", "Shape"]


def test_a_chain_stops_where_it_grows_too_large():
    m = build(
        """s = Constant<value = int64[2] {256, 4}>() n = Neg(v) r = ReduceSum<keepdims = 1>(n)
           e = Expand(r, s) y = Gemm<transB = 1>(x, e)"""
    )
    before = run(m, X)
    fold = FoldConstants(max_bytes=1024)
    fold(m)
    assert ops(m) == ["Expand", "Gemm"]
    assert_same_outputs(before, run(m, X), rtol=0, atol=0)


def test_random_operators_without_inputs_stay():
    m = build("r = RandomNormal<shape = [4]>() y = Add(x, r)")
    assert FoldConstants()(m) == 0
    assert ops(m) == ["RandomNormal", "Add"]
    assert FoldConstants().refused(m) == {}


def test_the_default_of_an_input_is_not_a_constant():
    m = build("t = Transpose(v) y = MatMul(x, t)")
    m.graph.inputs.append(m.graph.initializers["v"])
    assert FoldConstants()(m) == 0


def test_a_constant_that_is_an_output_stays():
    m = build("y = Constant<value = float[1,2] {1.0, 2.0}>() z = Relu(x)", "float[1,2] y, float[a,b] z")
    assert FoldConstants()(m) == 0
    assert_same_outputs({"y": np.array([[1, 2]], np.float32)}, {"y": run(m, X)["y"]})
