import numpy as np
import pytest
from helpers import assert_same_outputs, model, run, weights

from onnxq import graph
from onnxq.passes.equalize import Equalize

X = weights(2, 3, 7, 6)
POOL = "r = Relu(a)\n b = AveragePool<kernel_shape = [2, 2], pads = [0, 0, 1, 1], count_include_pad = 1>(r)"


def absorbing(pads="[0, 0, 0, 0]", between="b = Relu(a)"):
    m = model(
        f"""g (float[2,3,7,6] x, float[6,3,1,1] w, float[6] bias, float[4,6,2,2] v) => (float y) {{
            a = Conv(x, w, bias)
            {between}
            y = Conv<pads = {pads}>(b, v)
        }}""",
        w=weights(6, 3, 1, 1), bias=np.array([9, 7, 8, 0, 12, -1], np.float32), v=weights(4, 6, 2, 2),
    )  # fmt: skip
    graph.infer_shapes(m)
    floors = run(graph.with_outputs(m, ["a"], keep=False), {"x": X})["a"].min((0, 2, 3))
    assert (floors > 0).sum() >= 3
    assert (floors < 0).sum() >= 2
    return m, floors


def test_high_biases_are_absorbed_below_their_floor():
    m, floors = absorbing()
    before = run(m, {"x": X})
    rewrite = Equalize({"a": floors})
    assert rewrite(m) == 2
    assert_same_outputs(before, run(m, {"x": X}), rtol=1e-4, atol=1e-4)
    name = m.graph[0].outputs[0].name
    low = run(graph.with_outputs(m, [name], keep=False), {"x": X})[name].min((0, 2, 3))
    np.testing.assert_allclose(low[floors > 0], 0, atol=1e-4)
    assert (low[floors < 0] < 0).all()
    assert rewrite(m) == 0


@pytest.mark.parametrize(
    ("pads", "between"),
    [
        ("[0, 1, 0, 0]", "b = Relu(a)"),
        ("[0, 0, 0, 0]", POOL),
        ("[0, 0, 0, 0]", "r = Relu(a)\n b = Add(r, r)"),
    ],
)  # fmt: skip
def test_nothing_is_absorbed_where_zeros_come_in(pads, between):
    m, floors = absorbing(pads, between)
    before = run(m, {"x": X})
    assert Equalize({"a": floors})(m) == 1
    assert_same_outputs(before, run(m, {"x": X}), rtol=1e-4, atol=1e-4)


def test_floors_of_another_size_are_an_error():
    m, _ = absorbing()
    with pytest.raises(ValueError, match="a has 6 channels"):
        Equalize({"a": np.ones(5, np.float32)})(m)


def test_a_transposed_conv_takes_no_constant():
    m = model(
        """g (float[2,3,7,6] x, float[6,3,1,1] w, float[6] bias, float[6,4,2,2] v) => (float y) {
            a = Conv(x, w, bias)
            y = ConvTranspose(a, v)
        }""",
        w=weights(6, 3, 1, 1), bias=np.full(6, 9, np.float32), v=weights(6, 4, 2, 2),
    )  # fmt: skip
    before = run(m, {"x": X})
    assert Equalize({"a": np.full(6, 1, np.float32)})(m) == 1
    assert_same_outputs(before, run(m, {"x": X}), rtol=1e-4, atol=1e-4)


def test_a_chain_of_high_biases_is_absorbed_layer_by_layer():
    m = model(
        """g (float[2,3,7,6] x, float[6,3,1,1] w, float[6] bias, float[4,6,2,2] v, float[4] c, float[5,4,1,1] u) =>
            (float y) {
            a = Conv(x, w, bias)
            ra = Relu(a)
            b = Conv(ra, v, c)
            rb = Relu(b)
            y = Conv(rb, u)
        }""",
        w=weights(6, 3, 1, 1), bias=np.full(6, 9, np.float32), v=weights(4, 6, 2, 2), c=np.full(4, 150, np.float32),
        u=weights(5, 4, 1, 1),
    )  # fmt: skip
    values = run(graph.with_outputs(m, ["a", "b"], keep=False), {"x": X})
    floors = {name: value.min((0, 2, 3)) for name, value in values.items()}
    assert all((floor > 0).any() for floor in floors.values())
    before = run(m, {"x": X})
    rewrite = Equalize(floors)
    assert rewrite(m) >= 2
    assert_same_outputs(before, run(m, {"x": X}), rtol=1e-4, atol=1e-3)
    names = [node.outputs[0].name for node in m.graph if node.op_type == "Conv"][:2]
    lows = run(graph.with_outputs(m, names, keep=False), {"x": X})
    for name, floor in zip(names, floors.values(), strict=True):
        np.testing.assert_allclose(lows[name].min((0, 2, 3))[floor > 0], 0, atol=1e-3)
    assert rewrite(m) == 0
