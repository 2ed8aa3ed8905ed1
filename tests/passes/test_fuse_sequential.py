"""Layers behind layers against the one they become, in onnxruntime."""

import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.passes.base import apply
from onnxq.passes.branch_algebra import compose, composed_size
from onnxq.passes.branches import Branch, conv_branch
from onnxq.passes.fuse_sequential import FuseSequential


def sequence(text, inputs, outputs, size=(9, 8), **shapes):
    """A model from x [N, inputs, *size] to y, with random constants of the given shapes."""
    constants = {name: weights(*shape, seed=place) for place, (name, shape) in enumerate(shapes.items())}
    given = "".join(f", float{list(array.shape)} {name}" for name, array in constants.items())
    ins = "".join(f",{length}" for length in (inputs, *size))
    outs = "".join(f",{letter}" for letter in (outputs, *"AB"[: len(size)]))
    m = model(f"g (float[N{ins}] x{given}) => (float[N{outs}] y) {{ {text} }}", **constants)
    return m, {"x": weights(2, inputs, *size, seed=50)}


def check(m, feeds, expected, count=1):
    before = run(m, feeds)
    (applied,) = apply(m, [FuseSequential()], feeds)
    assert applied.count == count
    assert applied.gap <= 1e-5
    assert ops(m) == expected
    assert_same_outputs(before, run(m, feeds), rtol=1e-3, atol=1e-3)
    assert FuseSequential()(m) == 0


def stays(m, feeds, reason):
    before = ops(m)
    assert FuseSequential()(m) == 0
    assert ops(m) == before
    (found,) = FuseSequential().refused(m).values()
    assert reason in found


def test_a_pointwise_conv_goes_into_the_next_one():
    m, feeds = sequence(
        "a = Conv(x, u) y = Conv<pads = [1, 0, 2, 1], strides = [2, 1]>(a, v, b)",
        3, 5, u=(7, 3, 1, 1), v=(5, 7, 3, 3), b=(5,),
    )  # fmt: skip
    check(m, feeds, ["Conv"])
    assert graph.attribute(m.graph[0], "pads", []) == [1, 0, 2, 1]


def test_a_pointwise_conv_behind_one_with_padding_and_bias():
    m, feeds = sequence(
        "a = Conv<pads = [1, 0, 2, 1], dilations = [2, 1]>(x, u, b) y = Conv<group = 2>(a, v, c)",
        3, 4, u=(6, 3, 2, 3), b=(6,), v=(4, 3, 1, 1), c=(4,),
    )  # fmt: skip
    check(m, feeds, ["Conv"])


def test_three_in_a_row_and_strides_multiply():
    m, feeds = sequence(
        "a = Conv<strides = [2, 3]>(x, u, b) c = Conv(a, v) y = Conv<strides = [2, 1]>(c, w)",
        3, 5, u=(6, 3, 1, 1), b=(6,), v=(6, 6, 1, 1), w=(5, 6, 2, 1),
    )  # fmt: skip
    check(m, feeds, ["Conv"], 2)
    assert graph.attribute(m.graph[0], "strides", []) == [4, 3]
    assert graph.attribute(m.graph[0], "dilations", []) == [2, 1]


def test_a_depthwise_conv_goes_into_a_depthwise_one_and_a_dense_one_of_few_taps():
    m, feeds = sequence(
        "a = Conv<group = 4, strides = [2, 2]>(x, u, b) y = Conv(a, v)", 4, 6, u=(4, 1, 1, 1), b=(4,), v=(6, 4, 3, 3)
    )
    check(m, feeds, ["Conv"])
    m, feeds = sequence(
        "a = Conv<group = 4>(x, u, b) y = Conv<group = 8, pads = [0, 0, 0, 0]>(a, v)",
        4, 8, u=(8, 1, 3, 1), b=(8,), v=(8, 1, 1, 3),
    )  # fmt: skip
    stays(m, feeds, "one layer would multiply 1.50 times as much as the two")


def test_convs_that_stay_say_why():
    stays(
        *sequence(
            "a = Conv(x, u, b) y = Conv<pads = [1, 1, 1, 1]>(a, v)", 3, 5, u=(7, 3, 1, 1), b=(7,), v=(5, 7, 3, 3)
        ),
        "padding behind a bias reads zeros",
    )
    stays(
        *sequence("a = Conv(x, u) y = Conv<pads = [1, 1, 1, 1]>(a, v)", 1, 5, u=(7, 1, 2, 1), v=(5, 7, 1, 1)),
        "padding between two kernels reads zeros",
    )
    # 6 * 4 * 9 = 216 for one against 2 * 4 * 9 + 6 * 2 = 84
    stays(
        *sequence("a = Conv(x, u) y = Conv(a, v)", 4, 6, u=(2, 4, 3, 3), v=(6, 2, 1, 1)),
        "one layer would multiply 2.57 times as much",
    )
    stays(
        *sequence("a = Conv(x, u) b = Relu(a) c = Conv(a, v) y = Add(c, b)", 4, 2, u=(2, 4, 3, 3), v=(2, 2, 1, 1)),
        "has another reader",
    )
    stays(
        *sequence('a = Conv<auto_pad = "SAME_UPPER">(x, u) y = Conv(a, v)', 4, 2, u=(2, 4, 3, 3), v=(2, 2, 1, 1)),
        "pads automatically",
    )


def test_the_stride_of_the_outer_conv_saves_work_in_one_kernel():
    """The inner one is computed at every position, three of four for nothing: 12 * 9 * 4 + 24 against 6 * 4 * 9."""
    m, feeds = sequence("a = Conv(x, u) y = Conv<strides = [2, 2]>(a, v)", 4, 6, u=(2, 4, 3, 3), v=(6, 2, 1, 1))
    check(m, feeds, ["Conv"])


@pytest.mark.parametrize("biases", ["", "b", "c", "bc"])
@pytest.mark.parametrize("transposed", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_two_gemms(biases, transposed):
    first, second = ((5, 7)[:: 1 - 2 * transposed[0]]), ((7, 3)[:: 1 - 2 * transposed[1]])
    shapes = {"u": first, "v": second, "b": (7,), "c": (3,)}
    shapes = {name: shape for name, shape in shapes.items() if name in "uv" + biases}
    m, feeds = sequence(
        f"a = Gemm<transB = {transposed[0]}>(x, u{', b' if 'b' in biases else ''})"
        f"y = Gemm<transB = {transposed[1]}>(a, v{', c' if 'c' in biases else ''})",
        5, 3, size=(), **shapes,
    )  # fmt: skip
    check(m, feeds, ["Gemm"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("y = MatMul(a, v)", ["MatMul"]),
        ("d = Add(a, b) y = MatMul(d, v)", ["MatMul", "Add"]),
        ("e = MatMul(a, v) y = Add(c, e)", ["MatMul", "Add"]),
        ("d = Add(b, a) e = MatMul(d, v) y = Add(e, c)", ["MatMul", "Add"]),
    ],
)
def test_two_matrix_products(text, expected):
    constants = {"u": weights(5, 7), "v": weights(7, 3), "b": weights(7), "c": weights(3)}
    used = {k: a for k, a in constants.items() if k in ("u", "v") or f"({k}," in text or f", {k})" in text}
    given = "".join(f", float{list(array.shape)} {name}" for name, array in used.items())
    m = model(f"g (float[N,T,5] x{given}) => (float[N,T,3] y) {{ a = MatMul(x, u) {text} }}", **used)
    check(m, {"x": weights(2, 4, 5)}, expected)


def test_a_narrow_matrix_between_two_wide_ones_stays():
    m, feeds = sequence("a = Gemm(x, u) y = Gemm(a, v)", 8, 8, size=(), u=(8, 3), v=(3, 8))
    stays(m, feeds, "one layer would multiply 1.33 times as much")


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([(1, 1), (2, 2), (2, 1), (1, 3), (6, 2), (4, 6), (6, 6), (3, 2), (6, 1), (1, 12)]),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.tuples(st.integers(0, 2), st.sampled_from([0, 0, 0, 1])),
    st.booleans(),
    st.booleans(),
)
def test_a_composed_branch_computes_both(groups, kernels, strides, dilations, pads, bias, expand):
    """All that `compose` accepts is exact, whatever the work; what it refuses has padding behind a bias or taps."""
    (g, h), (k, j), (s, t), (d, e), (p, q) = groups, kernels, strides, dilations, pads
    inputs = 3 if expand and g in (1, 3) else 12
    shapes = {"u": (12, inputs // g, k, 1), "v": (12, 12 // h, j, 2)} | ({"b": (12,)} if bias else {})
    m, feeds = sequence(
        f"""a = Conv<group = {g}, strides = [{s}, 2], dilations = [{d}, 1], pads = [{p}, 1, {p + 1}, 0]>
              (x, u{", b" if bias else ""})
            y = Conv<group = {h}, strides = [{t}, 1], dilations = [{e}, 1], pads = [{q}, 0, {q}, 0]>(a, v)""",
        inputs, 12, size=(19, 17), **shapes,
    )  # fmt: skip
    inner, outer = (conv_branch(node) for node in m.graph)
    branch = compose(inner, outer)
    assert isinstance(branch, Branch) == (q == 0 or (k == 1 and not bias))
    if not isinstance(branch, Branch):
        return
    assert branch.kernel.size == composed_size(inner, outer)
    assert branch.cost == inner.kernel.size * t + outer.kernel.size
    fused = model(
        f"""g (float[N,{inputs},19,17] x, float{list(branch.kernel.shape)} k, float[12] b) => (float[N,12,A,B] y) {{
            y = Conv<group = {branch.group}, strides = {list(branch.strides)}, dilations = {list(branch.dilations)},
                     pads = {[*branch.begins, *branch.ends]}>(x, k, b) }}""",
        k=branch.kernel.astype(np.float32), b=branch.bias.astype(np.float32),
    )  # fmt: skip
    expected, got = run(m, feeds)["y"], run(fused, feeds)["y"]
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-5 * np.ptp(expected)


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([(1, 1), (2, 2), (6, 3), (2, 6)]),
    st.integers(1, 3),
    st.tuples(st.integers(1, 3), st.integers(1, 2)),
    st.integers(1, 2),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.integers(0, 1),
)
def test_a_padded_conv_behind_a_pointwise_one_without_bias(groups, j, strides, dilation, pads, r):
    (g, h), (s, t), (p, q) = groups, strides, pads
    m, feeds = sequence(
        f"""a = Conv<group = {g}, strides = [{s}, {s}], pads = [{r}, 0, 0, {r}]>(x, u)
            y = Conv<group = {h}, strides = [{t}, 1], dilations = [{dilation}, 1],
                     pads = [{p}, {q}, {q}, {p}]>(a, v)""",
        6, 6, size=(19, 17), u=(6, 6 // g, 1, 1), v=(6, 6 // h, j, 2),
    )  # fmt: skip
    inner, outer = (conv_branch(node) for node in m.graph)
    branch = compose(inner, outer)
    assert branch.begins == (p * s + r, q * s)
    fits = branch.kernel.size <= inner.cost * t + outer.cost
    before = run(m, feeds)
    (applied,) = apply(m, [FuseSequential()], feeds)
    assert applied.count == fits
    assert applied.gap <= 1e-5
    assert_same_outputs(before, run(m, feeds), rtol=1e-3, atol=1e-3)
