"""Sums of linear branches against the one Conv they become, in onnxruntime."""

import numpy as np
import pytest
from branching import NORM, check, statistics
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.passes.fuse_branches import FuseBranches

STATISTICS = "float[C] gamma, float[C] beta, float[C] mean, float[C] var"


@pytest.mark.parametrize("group", [1, 2, 4])
def test_a_repvgg_block_becomes_one_conv(group):
    text = f"""
    g (float[N,4,H,W] x, float[4,{4 // group},3,3] k3, float[4] b3, float[4,{4 // group},1,1] k1,
       {STATISTICS.replace("C", "4")}) => (float[N,4,A,B] y) {{
      a = Conv<pads = [1, 1, 1, 1], group = {group}>(x, k3, b3)
      b = Conv<group = {group}>(x, k1)
      i = {NORM}(x, gamma, beta, mean, var)
      s = Add(a, b)
      t = Add(s, i)
      y = Relu(t)
    }}
    """
    sizes = {"k3": (4, 4 // group, 3, 3), "b3": (4,), "k1": (4, 4 // group, 1, 1)}
    m = model(text, **{name: weights(*size, seed=7) for name, size in sizes.items()}, **statistics(4))
    check(m, {"x": weights(2, 4, 5, 7)}, ["Conv", "Relu"], 2)


def test_asymmetric_kernels_pooling_and_the_identity():
    text = """
    g (float[N,3,H,W] x, float[3,3,1,3] k13, float[3,3,3,1] k31) => (float[N,3,A,B] y) {
      a = Conv<pads = [0, 1, 0, 1]>(x, k13)
      b = Conv<pads = [1, 0, 1, 0]>(x, k31)
      p = AveragePool<kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1>(x)
      s = Add(a, b)
      t = Add(p, s)
      y = Add(t, x)
    }
    """
    m = model(text, k13=weights(3, 3, 1, 3), k31=weights(3, 3, 3, 1))
    check(m, {"x": weights(2, 3, 6, 5)}, ["Conv"], 3)


@given(
    group=st.sampled_from([1, 2]),
    kernels=st.tuples(st.sampled_from([1, 2, 3, 5]), st.sampled_from([1, 3])),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    pad=st.integers(0, 2),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_two_convs_are_fused_exactly_or_left_alone(group, kernels, stride, dilation, pad, bias):
    k, j = kernels
    extra = ((k - 1) * dilation - (j - 1) * dilation) / 2
    other = pad - extra
    if other < 0 or other != int(other):
        other = pad
    other = int(other)
    attributes = f"strides = [{stride}, {stride}], dilations = [{dilation}, {dilation}], group = {group}"
    text = f"""
    g (float[N,4,13,12] x, float[6,{4 // group},{k},{k}] u, float[6] b, float[6,{4 // group},{j},{j}] v)
      => (float[N,6,A,B] y) {{
      p = Conv<pads = [{pad}, {pad}, {pad}, {pad}], {attributes}>(x, u{", b" if bias else ""})
      q = Conv<pads = [{other}, {other}, {other}, {other}], {attributes}>(x, v)
      y = Add(p, q)
    }}
    """
    constants = {"u": weights(6, 4 // group, k, k), "b": weights(6), "v": weights(6, 4 // group, j, j, seed=3)}
    m = model(text, **constants)
    feeds = {"x": weights(2, 4, 13, 12)}
    same_size = (k - 1) * dilation - 2 * pad == (j - 1) * dilation - 2 * other
    if same_size and dilation > 1 and (pad - other) % dilation:
        assert list(FuseBranches().refused(m).values()) == ["their taps do not meet"]
    elif same_size:
        check(m, feeds, ["Conv"], 1)
    else:
        assert FuseBranches()(m) == 0
        assert list(FuseBranches().refused(m).values()) == ["their outputs differ in size"]


def refusal(body, **constants):
    given = {"k3": weights(4, 4, 3, 3), "k1": weights(4, 4, 1, 1)} | constants
    inputs = ", ".join(f"float{list(array.shape)} {name}" for name, array in given.items())
    m = model(f"g (float[N,4,8,8] x, {inputs}) => (float[N,4,A,B] y, float[N,4,C,D] z) {{ {body} }}", **given)
    before = ops(m)
    assert FuseBranches()(m) == 0
    assert ops(m) == before
    return list(FuseBranches().refused(m).values())


def test_refusals_say_why():
    pad = "pads = [1, 1, 1, 1]"
    tail = "z = Relu(x)"
    read = f"a = Conv<{pad}>(x, k3) b = Conv(x, k1) y = Add(a, b) z = Relu(b)"
    assert refusal(read)[0].endswith("is read elsewhere, too")
    strides = f"a = Conv<{pad}, strides = [8, 8]>(x, k3) b = Conv<strides = [9, 9]>(x, k1) y = Add(a, b) {tail}"
    assert refusal(strides) == ["strides (8, 8) and (9, 9) differ"]
    dilated = f"a = Conv<pads = [2, 2, 2, 2], dilations = [2, 2]>(x, k3) b = Conv<{pad}>(x, k3) y = Add(a, b) {tail}"
    assert refusal(dilated) == ["dilations [1, 2] differ"]
    pooled = f"a = Conv<{pad}>(x, k3) b = AveragePool<kernel_shape = [3, 3], {pad}>(x) y = Add(a, b) {tail}"
    assert refusal(pooled)[0].endswith("does not count its padding")
    automatic = f'a = Conv<auto_pad = "SAME_UPPER">(x, k3) b = Conv(x, k1) y = Add(a, b) {tail}'
    assert refusal(automatic)[0].endswith("pads automatically")


def test_sums_of_other_tensors_are_not_touched():
    assert refusal("r = Relu(x) a = Conv(r, k1) y = Add(a, x) z = Relu(x)") == []
    assert refusal("a = Conv(x, k1) y = Add(a, a) z = Relu(x)") == []


def test_shared_weights_stay_as_they_are():
    text = """
    g (float[N,4,6,6] x, float[4,4,1,1] k) => (float[N,4,A,B] y, float[N,4,C,D] z) {
      a = Conv(x, k)
      y = Add(a, x)
      r = Relu(x)
      z = Conv(r, k)
    }
    """
    m = model(text, k=weights(4, 4, 1, 1))
    feeds = {"x": weights(2, 4, 6, 6)}
    before = run(m, feeds)
    assert FuseBranches()(m) == 1
    assert_same_outputs(before, run(m, feeds))


def test_a_depthwise_branch_meets_a_dense_one():
    text = """
    g (float[N,4,6,6] x, float[4,4,3,3] dense, float[4,1,3,3] depthwise) => (float[N,4,A,B] y) {
      a = Conv<pads = [1, 1, 1, 1]>(x, dense)
      b = Conv<pads = [1, 1, 1, 1], group = 4>(x, depthwise)
      y = Add(b, a)
    }
    """
    m = model(text, dense=weights(4, 4, 3, 3), depthwise=weights(4, 1, 3, 3))
    check(m, {"x": weights(1, 4, 6, 6)}, ["Conv"], 1)


def test_a_dense_1x1_beside_a_depthwise_3x3_stays():
    text = """
    g (float[N,8,6,6] x, float[8,8,1,1] dense, float[8,1,3,3] depthwise) => (float[N,8,A,B] y) {
      a = Conv(x, dense)
      b = Conv<pads = [1, 1, 1, 1], group = 8>(x, depthwise)
      y = Add(b, a)
    }
    """
    m = model(text, dense=weights(8, 8, 1, 1), depthwise=weights(8, 1, 3, 3))
    assert FuseBranches()(m) == 0
    # 8 * 8 * 9 = 576 against 64 + 72 = 136
    assert list(FuseBranches().refused(m).values()) == ["the fused kernel would multiply 4.2 times as much"]


def test_one_dimension():
    text = """
    g (float[N,2,9] x, float[2,2,3] k) => (float[N,2,A] y) { a = Conv<pads = [1, 1]>(x, k) y = Add(x, a) }
    """
    m = model(text, k=weights(2, 2, 3))
    check(m, {"x": weights(2, 2, 9)}, ["Conv"], 1)
    np.testing.assert_array_equal(m.graph[0].inputs[1].const_value.shape, [2, 2, 3])


def test_a_conv_plus_its_own_input_where_that_is_a_conv_too():
    text = """
    g (float[N,2,6,6] x, float[4,2,3,3] a, float[4,4,3,3] b) => (float[N,4,A,B] y) {
      c = Conv(x, a)
      d = Conv<pads = [1, 1, 1, 1]>(c, b)
      y = Add(c, d)
    }
    """
    m = model(text, a=weights(4, 2, 3, 3), b=weights(4, 4, 3, 3))
    check(m, {"x": weights(2, 2, 6, 6)}, ["Conv", "Conv"], 1)


def test_a_kernel_that_8_bits_cannot_hold_is_refused_when_asked():
    text = """
    g (float[N,64,4,4] x, float[64,64,3,3] k) => (float[N,64,A,B] y) {
      a = Conv<pads = [1, 1, 1, 1]>(x, k)
      y = Add(a, x)
    }
    """
    cautious = FuseBranches(floor_db=32.0)
    m = model(text, k=weights(64, 64, 3, 3) * 0.01)
    assert cautious(m) == 0
    assert next(iter(cautious.refused(m).values())) == "the fused kernel would keep only 25 dB at 8 bits"
    assert FuseBranches()(m) == 1
    assert cautious(model(text, k=weights(64, 64, 3, 3))) == 1
