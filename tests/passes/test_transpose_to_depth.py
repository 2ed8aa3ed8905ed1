import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.passes import apply
from onnxq.passes.transpose_to_depth import TransposeToDepth

ANY = TransposeToDepth(growth=100.0)


def transposed(how, kernel=(2, 2), tail="y = Identity(t)", bias=True, inputs="float[N,3,H,W] x", outputs=5):
    given = {"w": weights(3, outputs, *kernel), **({"b": weights(outputs, seed=2)} if bias else {})}
    names = ", ".join(f"float{list(array.shape)} {name}" for name, array in given.items())
    text = f"""
    g ({inputs}, {names}) => (float[N,C,A,B] y) {{
      t = ConvTranspose<{how}>(x, w{", b" if bias else ""})
      {tail}
    }}
    """
    return model(text, **given)


def check(m, size=(4, 5), rewrite=ANY):
    feeds = {"x": weights(2, 3, *size, seed=9)}
    before = run(m, feeds)
    assert apply(m, [rewrite], feeds)[0].count == 1
    assert_same_outputs(before, run(m, feeds), atol=1e-4)
    assert rewrite(m) == 0
    assert rewrite.refused(m) == {}


@given(
    stride=st.integers(2, 3),
    begin=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    end=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    extra=st.tuples(st.integers(0, 1), st.integers(0, 1)),
    bias=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_any_that_multiplies_the_size_by_its_stride_is_rewritten_exactly(stride, begin, end, extra, bias):
    kernel = [stride + p + e - u for p, e, u in zip(begin, end, extra, strict=True)]
    how = f"strides = [{stride}, {stride}], pads = {[*begin, *end]}, output_padding = {list(extra)}"
    m = transposed(how, kernel, bias=bias)
    check(m)
    assert ops(m) == ["Conv", "DepthToSpace", "Identity"]


@pytest.mark.parametrize(
    ("how", "kernel", "taps"),
    [
        ("strides = [2, 2]", (2, 2), (1, 1)),
        ("strides = [3, 3]", (3, 3), (1, 1)),
        ("strides = [2, 2], pads = [1, 1, 1, 1]", (4, 4), (3, 3)),
        ("strides = [2, 2], pads = [1, 1, 1, 1], output_padding = [1, 1]", (3, 3), (2, 2)),
        ("strides = [2, 2], pads = [1, 0, 0, 1], output_padding = [0, 0]", (3, 3), (2, 2)),
    ],
)
def test_by_default_the_usual_upsamplings_are_rewritten(how, kernel, taps):
    m = transposed(how, kernel)
    check(m, rewrite=TransposeToDepth())
    assert m.graph[0].attributes["kernel_shape"].value == taps
    assert m.graph[0].inputs[1].const_value.shape == [5 * int(how[11]) ** 2, 3, *taps]


@pytest.mark.parametrize(
    ("tail", "between"),
    [("y = Relu(t)", "Relu"), ("low = Constant<value = float {-0.5}>() y = Clip(t, low)", "Clip")],
)
def test_an_activation_moves_to_the_convolution(tail, between):
    m = transposed("strides = [2, 2]", tail=tail)
    graph.lift_constants(m)
    check(m)
    assert ops(m) == ["Conv", between, "DepthToSpace"]
    assert m.graph.outputs[0].name == "y"


@pytest.mark.parametrize("tail", ["r = Relu(t) y = Add(r, t)", "y = Tanh(t)", "y = Exp(t)"])
def test_what_is_no_activation_or_not_alone_stays_behind(tail):
    m = transposed("strides = [2, 2]", tail=tail)
    behind = ops(m)[1:]
    check(m)
    assert ops(m) == ["Conv", "DepthToSpace", *behind]


def test_as_the_output_of_the_graph_it_keeps_the_name():
    text = "g (float[N,3,4,6] x, float[3,4,2,2] w) => (float[N,4,8,12] y) { y = ConvTranspose<strides = [2, 2]>(x, w) }"
    m = model(text, w=weights(3, 4, 2, 2))
    check(m, (4, 6))
    assert m.graph.outputs[0].name == "y"
    assert list(m.graph[0].outputs[0].shape)[1:] == [16, 4, 6]


def test_shared_weights_stay_as_they_are():
    text = """
    g (float[N,3,H,W] x, float[3,3,2,2] w) => (float[N,3,A,B] y, float[N,3,C,D] z) {
      y = ConvTranspose<strides = [2, 2]>(x, w)
      z = ConvTranspose<strides = [3, 3]>(x, w)
    }
    """
    m = model(text, w=weights(3, 3, 2, 2))
    feeds = {"x": weights(2, 3, 4, 5)}
    before = run(m, feeds)
    assert ANY(m) == 1
    assert_same_outputs(before, run(m, feeds))


@pytest.mark.parametrize(
    ("how", "kernel", "reason"),
    [
        ("strides = [2, 2]", (3, 3), "its output is not its input's size times its stride"),
        ("strides = [2, 3]", (2, 3), "its strides are 2 and 3"),
        ("strides = [1, 1], pads = [1, 1, 1, 1]", (3, 3), "its strides are 1 and 1"),
        ("strides = [2, 2], dilations = [2, 2]", (2, 2), "it has dilations"),
        ('strides = [2, 2], auto_pad = "SAME_UPPER"', (2, 2), "its padding is automatic"),
        ("strides = [2, 2], output_shape = [8, 10]", (2, 2), "its padding is automatic"),
        (
            "strides = [2, 2], pads = [2, 2, 2, 2], output_padding = [1, 1]",
            (5, 5),
            "the convolution would multiply 1.4 times as often",
        ),
    ],
)
def test_refusals_say_why(how, kernel, reason):
    m = transposed(how, kernel, inputs="float[N,3,4,5] x")
    cautious = TransposeToDepth(growth=1.0)
    assert cautious(m) == 0
    assert list(cautious.refused(m).values()) == [reason]


def test_groups_other_ranks_and_computed_weights_are_refused():
    grouped = model(
        "g (float[N,4,H,W] x, float[4,3,2,2] w) => (float[N,6,A,B] y) {y = ConvTranspose<strides=[2,2],group=2>(x,w) }",
        w=weights(4, 3, 2, 2),
    )
    lines = model(
        "g (float[N,3,W] x, float[3,4,2] w) => (float[N,4,A] y) { y = ConvTranspose<strides = [2]>(x, w) }",
        w=weights(3, 4, 2),
    )
    computed = model(
        "g (float[N,3,H,W] x, float[3,4,2,2] w) => (float[N,4,A,B] y) { y = ConvTranspose<strides = [2, 2]>(x, w) }"
    )
    for m, reason in (
        (grouped, "it has groups"),
        (lines, "it does not work over two axes"),
        (computed, "its weight is not a constant"),
    ):
        assert ANY(m) == 0
        assert list(ANY.refused(m).values()) == [reason]


def test_every_phase_of_every_output_has_its_place():
    m = model(
        """g (float[1,1,1,1] x, float[1,2,2,2] w, float[2] b) => (float[1,2,2,2] y) {
          y = ConvTranspose<strides = [2, 2]>(x, w, b)
        }""",
        w=np.arange(8, dtype=np.float32).reshape(1, 2, 2, 2),
        b=np.array([0, 100], np.float32),
    )
    assert TransposeToDepth()(m) == 1
    found = run(m, {"x": np.ones((1, 1, 1, 1), np.float32)})["y"]
    assert found.reshape(-1).tolist() == [0, 1, 2, 3, 104, 105, 106, 107]
