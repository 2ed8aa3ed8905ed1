import numpy as np
import pytest
from helpers import assert_same_outputs, model, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.passes import apply
from onnxq.passes.equalize import Equalize, balance
from onnxq.passes.equalize_groups import Group, groups

SPREAD = np.exp(np.linspace(-2, 3, 6)).astype(np.float32)
X = weights(2, 3, 7, 6)


def conv_pair(between, **constants):
    """Conv (stride 2, uneven pads, bias), `between` from a to b, grouped Conv."""
    extra = "".join(f", float[{','.join(map(str, np.shape(v)))}] {k}" for k, v in constants.items())
    m = model(
        f"""g (float[2,3,7,6] x, float[6,3,3,2] w, float[6] bias, float[4,3,2,2] v{extra}) => (float y) {{
            a = Conv<strides = [2, 1], pads = [1, 0, 2, 1]>(x, w, bias)
            {between}
            y = Conv<group = 2, pads = [0, 1, 1, 0]>(b, v)
        }}""",
        w=weights(6, 3, 3, 2) * SPREAD.reshape(-1, 1, 1, 1),
        bias=weights(6) * SPREAD,
        v=weights(4, 3, 2, 2),
        **constants,
    )
    graph.infer_shapes(m)
    return m


def array(m, name):
    return graph.constant(graph.value_map(m)[name])


def rows(w):
    return np.abs(w).reshape(len(w), -1).max(1)


def columns(w, group=1):
    parts = np.abs(w).reshape(group, w.shape[0] // group, w.shape[1], -1)
    return parts.max((1, 3)).reshape(-1)


def equalized(m, x=X, count=1):
    before = run(m, {"x": x})
    assert apply(m, [Equalize()], {"x": x})[0].count == count
    assert_same_outputs(before, run(m, {"x": x}), rtol=1e-4, atol=1e-4)
    assert Equalize()(m) == 0
    return m


SLOPES = weights(6, 1, 1, seed=4)
LINKS = {
    "nothing": ("b = Identity(a)", {}),
    "relu": ("b = Relu(a)", {}),
    "leaky": ("b = LeakyRelu<alpha = 0.3>(a)", {}),
    "prelu": ("b = PRelu(a, slope)", {"slope": SLOPES}),
    "one slope": ("b = PRelu(a, slope)", {"slope": np.array([-0.4], np.float32)}),
    "clip": ("b = Clip(a, low, high)", {"low": np.float32(0), "high": np.float32(3.4028235e38)}),
    "half clip": ("b = Clip(a, low)", {"low": np.float32(0)}),
    "max": ("r = Relu(a)\n b = MaxPool<kernel_shape = [2, 2], pads = [0, 1, 0, 1]>(r)", {}),
    "average": ("r = Relu(a)\n b = AveragePool<kernel_shape = [2, 2], pads = [0, 1, 0, 1]>(r)", {}),
    "dropout": ("r = Relu(a)\n b = Dropout(r)", {}),
    "shape": ("b = Relu(a)\n s = Shape(b)", {}),
}


@pytest.mark.parametrize(("between", "constants"), LINKS.values(), ids=LINKS)
def test_ranges_of_neighbours_meet(between, constants):
    m = conv_pair(between, **constants)
    w, v = array(m, "w"), array(m, "v")
    wanted = np.sqrt(rows(w) * columns(v, 2))
    equalized(m)
    np.testing.assert_allclose(rows(array(m, "w")), wanted, rtol=1e-5)
    np.testing.assert_allclose(columns(array(m, "v"), 2), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("between", "constants", "reason"),
    [
        ("b = Clip(a, low, high)", {"low": np.float32(0), "high": np.float32(6)}, "the bounds of"),
        ("b = Clip(a, low, high)", {"low": np.float32(-1), "high": np.float32(3.4028235e38)}, "the bounds of"),
        ("b = Sigmoid(a)", {}, "does not keep a scale per channel"),
        ("b = PRelu(a, a)", {}, "are not constants"),
        ("r = Relu(a)\n b = Mul(r, a)", {}, "Mul"),
        ("b = Add(a, c)", {"c": weights(6, 1, 1)}, "does not keep a scale per channel"),
        ("b = Transpose<perm = [0, 1, 3, 2]>(a)", {}, "Transpose"),
    ],
)
def test_refusals_name_what_is_between(between, constants, reason):
    m = conv_pair(between, **constants)
    assert Equalize()(m) == 0
    found = Equalize().refused(m)
    assert reason in found["Conv_0"]
    assert len(found) == 2  # the last layer's output is the model's


def test_a_tensor_that_is_an_output_is_left():
    m = model(
        "g (float[2,3] x, float[3,6] w, float[6,2] v) => (float[2,2] y, float[2,6] a) {\n a = MatMul(x, w)\n y = MatMul(a, v)\n}",  # noqa: E501
        w=weights(3, 6),
        v=weights(6, 2),
    )
    assert Equalize()(m) == 0
    assert Equalize().refused(m)["MatMul_0"] == "a is an output of the model"


def test_a_depthwise_chain_settles():
    m = model(
        """g (float[1,3,7,6] x, float[6,3,1,1] w, float[6] b1, float[12,1,3,3] d, float[12] b2, float[5,12,1,1] v) =>
            (float[1,5,7,6] y) {
            a = Conv(x, w, b1)
            ra = Relu(a)
            c = Conv<group = 6, pads = [1, 1, 1, 1]>(ra, d, b2)
            rc = Relu(c)
            y = Conv(rc, v)
        }""",
        w=weights(6, 3, 1, 1) * SPREAD.reshape(-1, 1, 1, 1),
        b1=weights(6),
        d=weights(12, 1, 3, 3),
        b2=weights(12, seed=2),
        v=weights(5, 12, 1, 1) * np.repeat(SPREAD, 2).reshape(1, -1, 1, 1),
    )
    equalized(m, X[:1], 2)
    w, d, v = (array(m, name) for name in "wdv")
    np.testing.assert_allclose(rows(w), columns(d, 6), rtol=2e-3)
    np.testing.assert_allclose(rows(d), columns(v), rtol=2e-3)


RESIDUAL = """g (float[1,3,7,6] x, float[6,3,1,1] w, float[6,6,3,3] u, float[6] bu, float[5,6,1,1] v, float[6,2] f) =>
    (float[1,5,7,6] y, float[1,2] z) {
    a = Conv(x, w)
    ra = Relu(a)
    c = Conv<pads = [1, 1, 1, 1]>(ra, u, bu)
    s = Add(c, ra)
    rs = Relu(s)
    y = Conv(rs, v)
    p = GlobalAveragePool(rs)
    t = Flatten(p)
    z = Gemm(t, f)
}"""


def residual(text=RESIDUAL):
    m = model(
        text,
        w=weights(6, 3, 1, 1) * SPREAD.reshape(-1, 1, 1, 1),
        u=weights(6, 6, 3, 3),
        bu=weights(6),
        v=weights(5, 6, 1, 1),
        f=weights(252, 2) if "Flatten(rs)" in text else weights(6, 2),
    )
    graph.infer_shapes(m)
    return m


def test_layers_around_a_residual_sum_share_a_scale():
    m = residual()
    ((_, group), *rest) = [entry for entry in groups(m) if isinstance(entry[1], Group)]
    assert not rest
    assert [layer.node.name for layer in group.producers] == ["Conv_0", "Conv_2"]
    assert {layer.node.name for layer in group.consumers} == {"Conv_2", "Conv_5", "Gemm_8"}
    equalized(m, X[:1])
    made = np.log([rows(array(m, "w")), rows(array(m, "u"))]).mean(0)
    read = np.log([columns(array(m, "u")), columns(array(m, "v")), np.abs(array(m, "f")).max(1)]).mean(0)
    np.testing.assert_allclose(made, read, atol=2e-3)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("s = Add(c, ra)", "q = Sigmoid(ra)\n s = Add(c, q)"), "Sigmoid"),
        (("t = Flatten(p)", "t = Flatten(rs)"), "mixes channels and space"),
        (("p = GlobalAveragePool(rs)", "p = Softmax(rs)"), "Softmax"),
        (("c = Conv<pads = [1, 1, 1, 1]>(ra, u, bu)", "c = Concat<axis = 1>(ra)"), "Concat"),
    ],
)
def test_one_bad_member_keeps_the_whole_residual_group(change, reason):
    text = RESIDUAL.replace(*change)
    m = residual(text.replace("[6,2] f", "[252,2] f") if "Flatten(rs)" in text else text)
    assert Equalize()(m) == 0
    assert reason in Equalize().refused(m)["Conv_0"]


def test_matrices_in_every_layout():
    m = model(
        """g (float[4,3] x, float[3,6] w, float[6] b, float[8,6] u, float[8] c, float[8,2] v) => (float[4,2] y) {
            p = MatMul(x, w)
            a = Add(b, p)
            ra = Relu(a)
            h = Gemm<transB = 1>(ra, u, c)
            rh = LeakyRelu(h)
            y = Gemm(rh, v)
        }""",
        w=weights(3, 6) * SPREAD,
        b=weights(6),
        u=weights(8, 6),
        c=weights(8),
        v=weights(8, 2),
    )
    equalized(m, weights(4, 3), 2)
    np.testing.assert_allclose(np.abs(array(m, "w")).max(0), np.abs(array(m, "u")).max(0), rtol=2e-3)
    np.testing.assert_allclose(np.abs(array(m, "u")).max(1), np.abs(array(m, "v")).max(1), rtol=2e-3)


def test_transposed_convs_with_groups():
    m = model(
        """g (float[1,3,7,6] x, float[6,3,1,1] w, float[6,2,3,3] t, float[4] bt, float[5,4,1,1] v) => (float y) {
            a = Conv(x, w)
            c = ConvTranspose<group = 2, strides = [2, 1]>(a, t, bt)
            rc = Relu(c)
            y = Conv(rc, v)
        }""",
        w=weights(6, 3, 1, 1) * SPREAD.reshape(-1, 1, 1, 1),
        t=weights(6, 2, 3, 3),
        bt=weights(4),
        v=weights(5, 4, 1, 1),
    )
    equalized(m, X[:1], 2)
    w, t, v = (array(m, name) for name in "wtv")
    np.testing.assert_allclose(rows(w), np.abs(t).max((1, 2, 3)), rtol=2e-3)
    np.testing.assert_allclose(np.abs(t).reshape(2, 3, 2, -1).max((1, 3)).reshape(-1), columns(v), rtol=2e-3)


def test_a_matrix_and_a_conv_over_other_axes_are_not_paired():
    m = model(
        "g (float[2,6,3] x, float[3,6] w, float[4,6,1] v) => (float[2,4,6] y) {\n a = MatMul(x, w)\n y = Conv(a, v)\n}",
        w=weights(3, 6),
        v=weights(4, 6, 1),
    )
    assert Equalize()(m) == 0
    assert "along another axis" in Equalize().refused(m)["MatMul_0"]


def test_dead_and_nearly_dead_channels_stay():
    m = conv_pair("b = Relu(a)")
    w, v, bias = array(m, "w").copy(), array(m, "v").copy(), array(m, "bias").copy()
    w[1] = 0.0
    v[:2, 2] = 0.0
    w[0] *= 1e-20
    graph.replace_constant(m, m.graph[0], 1, w)
    graph.replace_constant(m, m.graph[2], 1, v)
    equalized(m)
    for name, before in (("w", w), ("bias", bias)):
        np.testing.assert_array_equal(array(m, name)[:3], before[:3])
    np.testing.assert_allclose(rows(array(m, "w"))[3:], columns(array(m, "v"), 2)[3:], rtol=1e-5)


def test_a_channel_dead_in_one_of_two_layers_counts_as_average_there():
    m = residual()
    w = array(m, "w").copy()
    w[2] = 0.0
    graph.replace_constant(m, m.graph[0], 1, w)
    equalized(m, X[:1])
    written = [rows(array(m, "w")), rows(array(m, "u"))]
    read = np.log([columns(array(m, "u")), columns(array(m, "v")), np.abs(array(m, "f")).max(1)]).mean(0)
    written[0][2] = np.exp(np.log(np.delete(written[0], 2)).mean())
    np.testing.assert_allclose(np.log(written).mean(0), read, atol=2e-3)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 5))
def test_chains_of_any_length_settle(seed, length):
    random = np.random.default_rng(seed)
    sizes = random.integers(2, 6, length + 1)
    names = [f"w{i}" for i in range(length)]
    arrays = {
        n: (random.normal(size=(a, b)) * np.exp(random.normal(size=b))).astype(np.float32)
        for n, a, b in zip(names, sizes, sizes[1:], strict=False)
    }
    signature = ", ".join(f"float[{w.shape[0]},{w.shape[1]}] {n}" for n, w in arrays.items())
    body = "\n".join(f"h{i + 1} = MatMul(r{i}, {n})\n r{i + 1} = Relu(h{i + 1})" for i, n in enumerate(names))
    m = model(f"g (float[2,{sizes[0]}] r0, {signature}) => (float[2,{sizes[-1]}] r{length}) {{ {body} }}", **arrays)
    x = random.normal(size=(2, sizes[0])).astype(np.float32)
    before = run(m, {"r0": x})
    Equalize()(m)
    assert_same_outputs(before, run(m, {"r0": x}), rtol=1e-4, atol=1e-4)
    found = [group for _, group in groups(m) if isinstance(group, Group)]
    assert len(found) == length - 1
    for scale in balance(found):
        np.testing.assert_allclose(scale, 1.0, atol=2e-3)
    assert Equalize()(m) == 0
