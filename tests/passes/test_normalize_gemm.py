import numpy as np
import pytest
from helpers import assert_same_outputs, model, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.passes import NormalizeGemm

X = {"x": weights(4, 5, seed=3)}


def gemm(attributes="", bias=(3,), trans_b=0, body=None, constants=("w", "c"), opset=17):
    shape = (3, 5) if trans_b else (5, 3)
    arrays = {"w": weights(*shape), "c": weights(*bias, seed=1)}
    dims = f"[{','.join(map(str, bias))}]" if bias else ""
    body = body or f"y = Gemm<transB = {trans_b}{attributes}>(x, w, c)"
    free = {name: arrays[name] for name in arrays if name not in constants}
    m = model(
        f"g (float[4,5] x, float[{shape[0]},{shape[1]}] w, float{dims} c) => (float[4,3] y) {{ {body} }}",
        opset=opset,
        **{name: arrays[name] for name in constants},
    )
    return m, X | free


@settings(max_examples=40, deadline=None)
@given(
    alpha=st.sampled_from([1.0, 0.25, -1.5, 0.0]),
    beta=st.sampled_from([1.0, 3.0, 0.0]),
    bias=st.sampled_from([(3,), (1, 3), (1,), (1, 1), ()]),
    trans_b=st.integers(0, 1),
)
def test_factors_and_biases_become_plain(alpha, beta, bias, trans_b):
    m, feeds = gemm(f", alpha = {alpha}, beta = {beta}", bias, trans_b)
    before = run(m, feeds)
    assert NormalizeGemm()(m) == (alpha != 1 or beta != 1 or bias != (3,))
    (node,) = graph.nodes(m)
    assert set(node.attributes) <= {"transB"} or NormalizeGemm().refused(m) == {}
    assert graph.attribute(node, "alpha", 1.0) == graph.attribute(node, "beta", 1.0) == 1.0
    assert graph.constant(node.inputs[2]).shape == (3,)
    assert sorted(m.graph.initializers) == ["c", "w"]
    assert_same_outputs(before, run(m, feeds))
    assert NormalizeGemm()(m) == 0


def test_a_gemm_without_bias():
    m, feeds = gemm(body="y = Gemm<alpha = 0.3>(x, w)")
    before = run(m, feeds)
    assert NormalizeGemm()(m) == 1
    assert_same_outputs(before, run(m, feeds))


def test_a_shared_weight_is_scaled_for_one_reader_only():
    m, feeds = gemm(body="a = Gemm<alpha = 0.3>(x, w, c) b = Gemm(x, w, c) y = Sub(a, b)")
    before = run(m, feeds)
    assert NormalizeGemm()(m) == 1
    assert_same_outputs(before, run(m, feeds))


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        (
            "first operand is transposed",
            {"body": "t = Transpose(x) y = Gemm<transA = 1, alpha = 0.5>(t, w, c)"},
        ),
        ("its weight is not a constant", {"attributes": ", alpha = 0.5", "constants": ("c",)}),
        ("its bias is not a constant", {"attributes": ", beta = 0.5", "constants": ("w",)}),
        ("its bias has shape [4, 3]", {"bias": (4, 3)}),
        ("its bias has shape [4, 1]", {"bias": (4, 1)}),
        ("overflow", {"attributes": ", alpha = 3e38"}),
    ],
)
def test_says_why_it_stays(reason, changes):
    m, feeds = gemm(**changes)
    before = run(m, feeds)
    assert NormalizeGemm()(m) == 0
    assert_same_outputs(before, run(m, feeds), rtol=0, atol=0)
    (text,) = NormalizeGemm().refused(m).values()
    assert reason in text


def test_integers_are_left_alone():
    m = model(
        "g (int32[2,2] x, int32[2,2] w) => (int32[2,2] y) { y = Gemm<alpha = 2.0>(x, w) }",
        w=np.array([[1, 2], [3, 4]], np.int32),
    )
    assert NormalizeGemm()(m) == 0
    assert "int32" in next(iter(NormalizeGemm().refused(m).values()))
