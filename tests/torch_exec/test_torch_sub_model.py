"""`graph.sub_model`: the same nodes for onnxruntime."""

import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights

from onnxq import graph

TEXT = """g (float[2,4] x, float[2,3] other, float[4,3] w) => (float[2,3] y, float[2,3] z) {
    a = MatMul(x, w)
    b = Relu(a)
    c = Add(b, other)
    y = Mul(c, b)
    z = Neg(c)
}"""


@pytest.fixture
def made():
    return model(TEXT, w=weights(4, 3))


def test_it_starts_and_ends_where_asked(made):
    feeds = {"x": weights(2, 4), "other": weights(2, 3)}
    full = run(graph.with_outputs(made, ["a", "c"]), feeds)
    cut = graph.sub_model(made, ["other", "a"], ["z", "c"])
    assert ops(cut) == ["Relu", "Add", "Neg"]
    assert [value.name for value in cut.graph.inputs] == ["other", "a"]
    assert not cut.graph.initializers
    found = run(cut, {"a": full["a"], "other": feeds["other"]})
    assert_same_outputs({name: full[name] for name in ("z", "c")}, found)


def test_other_batch_sizes_may_be_fed(made):
    found = run(graph.sub_model(made, ["a"], ["b"]), {"a": weights(7, 3)})
    np.testing.assert_array_equal(found["b"], np.maximum(weights(7, 3), 0))


def test_a_constant_may_be_fed(made):
    w = weights(4, 3, seed=9)
    found = run(graph.sub_model(made, ["x", "w"], ["a"]), {"x": weights(2, 4), "w": w})
    np.testing.assert_allclose(found["a"], weights(2, 4) @ w, rtol=1e-5, atol=1e-6)


def test_the_model_stays_as_it_is(made):
    before = graph.to_bytes(made)
    graph.sub_model(made, ["c", "w"], ["z"])
    assert graph.to_bytes(made) == before
    assert made.graph.initializers["w"].const_value.name == "w"


def test_what_lies_before_an_input_is_not_computed_twice(made):
    cut = graph.sub_model(made, ["b", "c"], ["y"])
    assert ops(cut) == ["Mul"]
    assert cut.graph.outputs[0].shape is None


def test_an_input_may_be_an_output(made):
    cut = graph.sub_model(made, ["a"], ["b", "a"])
    assert [value.name for value in cut.graph.outputs] == ["b", "a"]
    found = run(cut, {"a": weights(2, 3)})
    np.testing.assert_array_equal(found["a"], weights(2, 3))


def test_an_open_input_is_refused(made):
    with pytest.raises(ValueError, match="other"):
        graph.sub_model(made, ["x"], ["y"])
