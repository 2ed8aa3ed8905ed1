import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.passes import apply
from onnxq.passes.merge_groups import MergeGroups


def grouped(group, inputs, outputs, how="pads = [1, 0, 0, 1], strides = [2, 1]", kernel=(3, 2)):
    given = {"w": weights(group * outputs, inputs, *kernel), "b": weights(group * outputs, seed=2)}
    names = ", ".join(f"float{list(array.shape)} {name}" for name, array in given.items())
    text = f"g (float[N,{group * inputs},H,W] x, {names}) => (float[N,C,A,B] y)"
    return model(f"{text} {{ y = Conv<group = {group}, {how}>(x, w, b) }}", **given)


def check(m, channels, rewrite):
    feeds = {"x": weights(2, channels, 5, 6, seed=9)}
    before = run(m, feeds)
    assert apply(m, [rewrite], feeds)[0].count == 1
    assert ops(m) == ["Conv"]
    assert_same_outputs(before, run(m, feeds), atol=1e-4)
    assert rewrite(m) == 0
    assert rewrite.refused(m) == {}


def shape(m):
    return m.graph[0].attributes["group"].value, list(m.graph[0].inputs[1].const_value.shape)


@given(
    group=st.integers(2, 12),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    channels=st.integers(2, 12),
)
@settings(max_examples=40, deadline=None)
def test_groups_are_merged_exactly_or_left_alone(group, inputs, outputs, channels):
    m, rewrite = grouped(group, inputs, outputs), MergeGroups(channels)
    old = shape(m)
    if inputs == outputs == 1 or min(inputs, outputs) >= channels:
        assert rewrite(m) == 0
        assert rewrite.refused(m) == {}
        assert shape(m) == old
        return
    merged = next((k for k in range(2, group + 1) if group % k == 0 and k * min(inputs, outputs) >= channels), group)
    if merged * max(inputs, outputs) > 4 * channels:
        assert rewrite(m) == 0
        assert len(rewrite.refused(m)) == 1
        assert shape(m) == old
        return
    check(m, group * inputs, rewrite)
    assert shape(m) == (group // merged, [group * outputs, inputs * merged, 3, 2])


@pytest.mark.parametrize(
    ("group", "inputs", "outputs", "merged"),
    [(32, 4, 4, 4), (8, 8, 8, 2), (4, 16, 16, 2), (32, 1, 2, 1), (8, 2, 2, 1), (24, 4, 4, 3), (4, 31, 31, 2)],
)
def test_by_default_a_group_gets_at_least_32_channels(group, inputs, outputs, merged):
    m = grouped(group, inputs, outputs)
    check(m, group * inputs, MergeGroups())
    assert shape(m)[0] == merged


@pytest.mark.parametrize(("group", "inputs", "outputs"), [(64, 1, 1), (2, 32, 32), (4, 64, 33), (1, 8, 8)])
def test_depthwise_dense_and_wide_convolutions_stay(group, inputs, outputs):
    m = grouped(group, inputs, outputs)
    assert MergeGroups()(m) == 0
    assert MergeGroups().refused(m) == {}


def test_refusals_say_why():
    m = grouped(7, 31, 31)
    assert MergeGroups()(m) == 0
    assert list(MergeGroups().refused(m).values()) == ["7 groups of 31 channels only merge into groups of 217"]
    text = "g (float[N,8,H,W] x, float[8,2,3,3] w) => (float[N,8,A,B] y) { y = Conv<group = 4>(x, w) }"
    m = model(text)
    assert MergeGroups()(m) == 0
    assert list(MergeGroups().refused(m).values()) == ["its weight is not a constant"]


def test_shared_weights_stay_as_they_are():
    text = """
    g (float[N,4,H,W] x, float[4,2,3,3] w) => (float[N,4,A,B] y, float[N,4,C,D] z) {
      y = Conv<group = 2>(x, w)
      t = Slice(x, zero, two, one)
      z = Conv(t, w)
    }
    """.replace("float[4,2,3,3] w", "float[4,2,3,3] w, int64[1] zero, int64[1] two, int64[1] one")
    m = model(text, w=weights(4, 2, 3, 3), zero=np.array([0]), two=np.array([2]), one=np.array([1]))
    feeds = {"x": weights(2, 4, 5, 6)}
    before = run(m, feeds)
    assert MergeGroups()(m) == 1
    assert_same_outputs(before, run(m, feeds))


def test_one_dimension():
    text = "g (float[N,6,W] x, float[9,2,3] w) => (float[N,9,A] y) { y = Conv<group = 3>(x, w) }"
    m = model(text, w=weights(9, 2, 3))
    feeds = {"x": weights(2, 6, 8)}
    before = run(m, feeds)
    assert MergeGroups()(m) == 1
    assert_same_outputs(before, run(m, feeds))
    assert shape(m) == (1, [9, 6, 3])
