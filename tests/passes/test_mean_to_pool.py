import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights

from onnxq.passes import MeanToPool, apply

X = weights(2, 3, 5, 4)


@pytest.mark.parametrize("axes", ["2, 3", "3, 2", "-1, -2", "2, -1"])
@pytest.mark.parametrize(("keep", "expected"), [(1, ["GlobalAveragePool"]), (0, ["GlobalAveragePool", "Flatten"])])
def test_a_spatial_mean_becomes_a_pool(axes, keep, expected):
    shape = "1,1" if keep else ""
    out = f"float[n,c{',' if keep else ''}{shape}] y"
    m = model(f"g (float[n,3,5,4] x) => ({out}) {{ y = ReduceMean<axes = [{axes}], keepdims = {keep}>(x) }}")
    before = run(m, {"x": X})
    assert apply(m, [MeanToPool()], {"x": X})[0].count == 1
    assert ops(m) == expected
    assert_same_outputs(before, run(m, {"x": X}))
    assert MeanToPool()(m) == 0


def test_axes_as_an_input_from_opset_18_on():
    axes = np.array([2, 3], np.int64)
    m = model("g (float[n,3,5,4] x, int64[2] a) => (float[n,3,1,1] y) { y = ReduceMean(x, a) }", opset=18, a=axes)
    before = run(m, {"x": X})
    assert MeanToPool()(m) == 1
    assert ops(m) == ["GlobalAveragePool"]
    assert_same_outputs(before, run(m, {"x": X}))


def test_an_average_over_the_whole_input_becomes_a_pool():
    text = "g (float[n,3,5,4] x) => (float[n,3,1,1] y) { y = AveragePool<kernel_shape = [5, 4]>(x) }"
    m = model(text)
    before = run(m, {"x": X})
    assert MeanToPool()(m) == 1
    assert ops(m) == ["GlobalAveragePool"]
    assert_same_outputs(before, run(m, {"x": X}))


@pytest.mark.parametrize(
    "node",
    [
        "ReduceMean<axes = [1, 2], keepdims = 1>(x)",
        "ReduceMean<axes = [2], keepdims = 1>(x)",
        "ReduceMean<axes = [1, 2, 3], keepdims = 1>(x)",
        "AveragePool<kernel_shape = [5, 3]>(x)",
        "AveragePool<kernel_shape = [5, 4], pads = [1, 1, 1, 1]>(x)",
        'AveragePool<kernel_shape = [5, 4], auto_pad = "SAME_UPPER">(x)',
    ],
)
def test_other_means_stay(node):
    m = model(f"g (float[n,3,5,4] x) => (float[a,b,c,d] y) {{ y = {node} }}")
    before = run(m, {"x": X})
    assert MeanToPool()(m) == 0
    assert_same_outputs(before, run(m, {"x": X}))


def test_a_mean_over_space_of_unknown_rank_is_refused_with_a_reason():
    m = model("g (float x) => (float y) { y = ReduceMean<axes = [2, 3], keepdims = 1>(x) }")
    m.graph.inputs[0].shape = None
    assert MeanToPool()(m) == 0
    assert list(MeanToPool().refused(m).values()) == ["the rank of its input is not known"]
