import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.passes import FoldPad

X = {"x": weights(2, 2, 7, 8, seed=3)}


def padded(reader, pads=(0, 0, 1, 2, 0, 0, 3, 0), pad="p = Pad(x, pads)", output="float[a,b,c,d] y"):
    constants = {
        "pads": np.array(pads),
        "w": weights(4, 2, 3, 3),
        "zero": np.float32(0),
        "half": np.float32(0.5),
    }
    return model(
        f"""g (float[2,2,7,8] x, int64[{len(pads)}] pads, float[4,2,3,3] w, float zero, float half,
               int64[2] axes) => ({output}) {{ {pad} {reader} }}""",
        opset=19,
        axes=np.array([3, -2]),
        **constants,
    )


READERS = [
    "y = Conv(p, w)",
    "y = Conv<pads = [2,1,0,3], strides = [2,1], dilations = [1,2]>(p, w)",
    'y = Conv<auto_pad = "VALID">(p, w)',
    "y = AveragePool<kernel_shape = [4,4], strides = [2,3]>(p)",
    "y = AveragePool<kernel_shape = [4,4], count_include_pad = 1>(p)",
    "y = AveragePool<kernel_shape = [5,4], pads = [1,0,1,1], count_include_pad = 1>(p)",
]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize(
    "pad", ["p = Pad(x, pads)", "p = Pad(x, pads, zero)", 'p = Pad<mode = "constant">(x, pads, zero)']
)
def test_becomes_the_padding_of_its_reader(reader, pad):
    m = padded(reader, pad=pad)
    before = run(m, X)
    assert FoldPad()(m) == 1
    assert ops(m) == [reader[4:].split("<")[0].split("(")[0]]
    assert_same_outputs(before, run(m, X))
    assert FoldPad()(m) == 0
    assert FoldPad().refused(m) == {}


@settings(max_examples=30, deadline=None)
@given(
    pads=st.lists(st.integers(0, 3), min_size=4, max_size=4),
    own=st.lists(st.integers(0, 2), min_size=4, max_size=4),
    strides=st.lists(st.integers(1, 3), min_size=2, max_size=2),
)
def test_paddings_add_up(pads, own, strides):
    m = padded(f"y = Conv<pads = {own}, strides = {strides}>(p, w)", pads=(0, 0, *pads[:2], 0, 0, *pads[2:]))
    before = run(m, X)
    assert FoldPad()(m) == 1
    assert graph.attribute(next(graph.nodes(m)), "pads", []) == [a + b for a, b in zip(pads, own, strict=True)]
    assert_same_outputs(before, run(m, X))


def test_named_axes_in_any_order():
    m = padded("y = Conv(p, w)", pads=(1, 2, 3, 0), pad="p = Pad(x, pads, zero, axes)")
    before = run(m, X)
    assert FoldPad()(m) == 1
    assert graph.attribute(next(graph.nodes(m)), "pads", []) == [2, 1, 0, 3]
    assert_same_outputs(before, run(m, X))


def test_folds_into_all_readers_or_none():
    m = padded("y = Conv(p, w) z = Conv<strides = [2,2]>(p, w)", output="float[a,b,c,d] y, float[a,b,e,f] z")
    before = run(m, X)
    assert FoldPad()(m) == 1
    assert ops(m) == ["Conv", "Conv"]
    assert_same_outputs(before, run(m, X))
    m = padded("y = Conv(p, w) z = Relu(p)", output="float[a,b,c,d] y, float[a,b,e,f] z")
    assert FoldPad()(m) == 0
    assert "Relu reads" in FoldPad().refused(m)[next(graph.nodes(m, "Pad")).name]


PAD, CONV = "p = Pad(x, pads)", "y = Conv(p, w)"
REFUSED = {
    "reflect mode": ('p = Pad<mode = "reflect">(x, pads)', CONV, None),
    "other than zero": ("p = Pad(x, pads, half)", CONV, None),
    "pads are computed": ("q = Add(pads, pads) p = Pad(x, q)", CONV, None),
    "crops": (PAD, CONV, (0, 0, -1, 1, 0, 0, 1, 1)),
    "the batch or the channels": (PAD, CONV, (1, 0, 1, 1, 0, 0, 1, 1)),
    "pads by itself (SAME_UPPER)": (PAD, 'y = Conv<auto_pad = "SAME_UPPER">(p, w)', None),
    "minus infinity": (PAD, "y = MaxPool<kernel_shape = [4,4]>(p)", None),
    "rounds its size up": (
        PAD,
        "y = AveragePool<kernel_shape = [4,4], ceil_mode = 1, strides = [3,3]>(p)",
        None,
    ),
    "does not count": (PAD, "y = AveragePool<kernel_shape = [5,5], pads = [1,1,1,1]>(p)", None),
    "not larger than the padding": (PAD, "y = AveragePool<kernel_shape = [3,3]>(p)", None),
    "it is the weight of": (PAD, "y = Conv<pads = [9,9,9,9]>(x, p)", None),
    "output of the model": ("y = Pad(x, pads)", "z = Conv(y, w)", None),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_says_why_it_stays(reason):
    pad, reader, pads = REFUSED[reason]
    output = "float[a,b,c,d] y" + (", float[a,b,e,f] z" if "z =" in reader else "")
    m = padded(reader, pad=pad, output=output, **({"pads": pads} if pads else {}))
    before = ops(m)
    assert FoldPad()(m) == 0
    assert ops(m) == before
    assert reason in FoldPad().refused(m)[next(graph.nodes(m, "Pad")).name]


def test_a_pad_that_no_layer_reads_is_not_its_business():
    m = padded("y = Relu(p)")
    assert FoldPad()(m) == 0
    assert FoldPad().refused(m) == {}
