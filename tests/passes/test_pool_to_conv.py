import pytest
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.passes import apply
from onnxq.passes.pool_to_conv import PoolToConv


def pooled(how, inputs="float[N,3,H,W]", dtype="float", opset=17):
    return model(f"g ({inputs} x) => ({dtype}[N,C,A,B] y) {{ y = AveragePool<{how}>(x) }}", opset)


def check(m, size=(9, 8)):
    feeds = {"x": weights(2, 3, *size)}
    before = run(m, feeds)
    assert apply(m, [PoolToConv()], feeds)[0].count == 1
    assert ops(m) == ["Conv"]
    assert m.graph[0].attributes["group"].value == 3
    assert_same_outputs(before, run(m, feeds))
    assert PoolToConv()(m) == 0
    assert PoolToConv().refused(m) == {}


@given(
    kernel=st.tuples(st.integers(2, 4), st.integers(2, 4)),
    strides=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    pads=st.tuples(*[st.integers(0, 1)] * 4),
    dilations=st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
@settings(max_examples=40, deadline=None)
def test_any_pool_of_fixed_size_becomes_a_depthwise_convolution(kernel, strides, pads, dilations):
    how = f"kernel_shape = {list(kernel)}, strides = {list(strides)}, pads = {list(pads)}, count_include_pad = 1"
    check(pooled(f"{how}, dilations = {list(dilations)}", opset=19))


def test_without_padding_it_does_not_matter_what_counts():
    check(pooled("kernel_shape = [2, 3], pads = [0, 0, 0, 0], count_include_pad = 0"))
    check(pooled('kernel_shape = [2, 3], auto_pad = "VALID"'))


@pytest.mark.parametrize(
    ("how", "inputs", "reason"),
    [
        ("kernel_shape = [3, 3], pads = [1, 1, 1, 1]", "float[N,3,H,W]", "y does not count its padding"),
        ("kernel_shape = [2, 2], ceil_mode = 1", "float[N,3,H,W]", "y sizes itself"),
        ('kernel_shape = [2, 2], auto_pad = "SAME_UPPER"', "float[N,3,H,W]", "y sizes itself"),
        ("kernel_shape = [2, 2]", "float[N,C,H,W]", "the number of its channels is not known"),
        ("kernel_shape = [7, 7]", "float[N,3,7,7]", "it returns one position"),
    ],
)
def test_refusals_say_why(how, inputs, reason):
    m = pooled(how, inputs)
    m.graph[0].name = "y"
    m.graph[0].outputs[0].shape = None
    graph.infer_shapes(m)
    assert PoolToConv()(m) == 0
    assert list(PoolToConv().refused(m).values()) == [reason]


def test_one_row_of_positions_is_rewritten():
    check(pooled("kernel_shape = [7, 3]", "float[N,3,7,8]"), (7, 8))


def test_other_ranks_and_types_are_refused():
    m = model("g (float[N,3,W] x) => (float[N,3,A] y) { y = AveragePool<kernel_shape = [2]>(x) }")
    assert PoolToConv()(m) == 0
    assert list(PoolToConv().refused(m).values()) == ["it does not pool over two axes"]
    m = pooled("kernel_shape = [2, 2]", "double[N,3,H,W]", "double")
    assert PoolToConv()(m) == 0
    assert list(PoolToConv().refused(m).values()) == ["it works on float64 values"]
