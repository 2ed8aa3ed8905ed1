import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.passes import FoldBatchNorm, NormalizeGemm

BN = "BatchNormalization<epsilon = 0.1>"
S = "gamma, beta, mean, var"


def norm(channels, seed=7):
    """Parameters none of which is near its neutral value."""
    return {
        "gamma": weights(channels, seed=seed),
        "beta": weights(channels, seed=seed + 1),
        "mean": weights(channels, seed=seed + 2),
        "var": weights(channels, seed=seed + 3, low=0.5, high=4.0),
    }


def norm_inputs(channels):
    return ", ".join(f"float[{channels}] {name}" for name in ("gamma", "beta", "mean", "var"))


def convolution(op, inputs, outputs, group, bias, kernel=(3, 3), attributes=""):
    """x -> op -> BatchNormalization -> y."""
    shape = (outputs, inputs // group) if op == "Conv" else (inputs, outputs // group)
    dims = ",".join(map(str, (*shape, *kernel)))
    constants = {"w": weights(*shape, *kernel), **norm(outputs)} | ({"b": weights(outputs)} if bias else {})
    space = ",".join("6" * len(kernel))
    text = f"""
        g (float[N,{inputs},{space}] x, float[{dims}] w, {f"float[{outputs}] b," if bias else ""}
           {norm_inputs(outputs)}) => (float[N,{outputs},{",".join("abc"[: len(kernel)])}] y) {{
            c = {op}<group = {group}{attributes}>(x, w{", b" if bias else ""})
            y = {BN}(c, {S})
        }}"""
    return model(text, **constants), {"x": weights(2, inputs, *[6] * len(kernel), seed=5)}


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs", "group"), [(4, 6, 1), (4, 6, 2), (4, 4, 4), (4, 8, 4), (6, 3, 3)])
def test_becomes_part_of_a_convolution(op, bias, inputs, outputs, group):
    m, feeds = convolution(op, inputs, outputs, group, bias, attributes=", strides = [2,2], pads = [1,1,1,1]")
    before = run(m, feeds)
    assert FoldBatchNorm()(m) == 1
    assert ops(m) == [op]
    assert graph.name_of(m.graph.outputs[0]) == "y"
    assert_same_outputs(before, run(m, feeds))
    assert FoldBatchNorm()(m) == 0
    assert FoldBatchNorm().refused(m) == {}


@settings(max_examples=25, deadline=None)
@given(
    op=st.sampled_from(["Conv", "ConvTranspose"]),
    group=st.integers(1, 4),
    per_group=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    bias=st.booleans(),
)
def test_becomes_part_of_any_convolution(op, group, per_group, kernel, bias):
    inputs, outputs = group * per_group[0], group * per_group[1]
    m, feeds = convolution(op, inputs, outputs, group, bias, kernel=tuple(kernel))
    before = run(m, feeds)
    assert FoldBatchNorm()(m) == 1
    assert_same_outputs(before, run(m, feeds))


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", ["", "float[3] b", "float[1,3] b", "float[1] b", "float b"])
@pytest.mark.parametrize("factors", ["", ", alpha = 0.3, beta = 1.7"])
def test_becomes_part_of_a_gemm(transposed, bias, factors):
    shape = (3, 5) if transposed else (5, 3)
    constants = {"w": weights(*shape), **norm(3)}
    if bias:
        constants["b"] = weights(*[int(n) for n in bias[5:-2].strip("[]").split(",") if n])
    m = model(
        f"""g (float[N,5] x, float[{shape[0]},{shape[1]}] w, {bias + "," if bias else ""} {norm_inputs(3)})
            => (float[N,3] y) {{
            c = Gemm<transB = {transposed}{factors}>(x, w{", b" if bias else ""})
            y = {BN}(c, {S})
        }}""",
        **constants,
    )
    feeds = {"x": weights(4, 5, seed=5)}
    before = run(m, feeds)
    assert NormalizeGemm()(m) == (bias not in ("", "float[3] b") or bool(factors))
    assert FoldBatchNorm()(m) == 1
    assert ops(m) == ["Gemm"]
    assert_same_outputs(before, run(m, feeds))


@pytest.mark.parametrize("add", ["", "a = Add(c, b)", "a = Add(b, c)"])
def test_becomes_part_of_a_matrix_product(add):
    m = model(
        f"""g (float[N,5] x, float[5,3] w, {"float[3] b," if add else ""} {norm_inputs(3)})
            => (float[N,3] y) {{ c = MatMul(x, w) {add} y = {BN}({"a" if add else "c"}, {S})
        }}""",
        **{"w": weights(5, 3), **norm(3)} | ({"b": weights(3)} if add else {}),
    )
    graph.infer_shapes(m)
    feeds = {"x": weights(4, 5, seed=5)}
    before = run(m, feeds)
    assert FoldBatchNorm()(m) == 1
    assert ops(m) == ["MatMul", "Add"]
    assert_same_outputs(before, run(m, feeds))
    assert FoldBatchNorm()(m) == 0


def test_keeps_the_names_of_weights_and_layers():
    m, _ = convolution("Conv", 2, 3, 1, bias=True)
    (layer,) = graph.nodes(m, "Conv")
    name = layer.name
    FoldBatchNorm()(m)
    graph.remove_unused(m)
    assert sorted(m.graph.initializers) == ["b", "w"]
    assert [node.name for node in m.graph] == [name]


def test_two_layers_may_share_their_weight():
    m = model(
        f"""g (float[1,2,4,4] x, float[2,2,1,1] w, {norm_inputs(2)}) => (float[1,2,4,4] y) {{
            c = Conv(x, w) d = {BN}(c, {S}) y = Conv(d, w)
        }}""",
        w=weights(2, 2, 1, 1),
        **norm(2),
    )
    shared = graph.constant(m.graph.initializers["w"]).copy()
    before = run(m, {"x": weights(1, 2, 4, 4, seed=5)})
    assert FoldBatchNorm()(m) == 1
    assert_same_outputs(before, run(m, {"x": weights(1, 2, 4, 4, seed=5)}))
    np.testing.assert_array_equal(graph.constant(m.graph.initializers["w"]), shared)


def test_a_copy_of_the_model_keeps_its_weights():
    m, feeds = convolution("Conv", 2, 3, 1, bias=True)
    copy = m.clone()
    before = run(copy, feeds)
    FoldBatchNorm()(m)
    assert ops(copy) == ["Conv", "BatchNormalization"]
    assert_same_outputs(before, run(copy, feeds), rtol=0, atol=0)


BODIES = {
    "another reader": f"c = Conv(x, w) y = {BN}(c, {S}) z = Relu(c)",
    "output of the model": f"z = Conv(x, w) y = {BN}(z, {S})",
    "a Relu is in front": f"c = Conv(x, w) z = Relu(c) y = {BN}(z, {S})",
    "no Conv": f"y = {BN}(x, {S}) z = Conv(x, w)",
    "both operands": f"c = MatMul(x, x) z = Relu(x) d = Add(c, z) y = {BN}(d, {S})",
    "its weight is not a constant": f"v = Relu(w) c = Conv(x, v) y = {BN}(c, {S}) z = Relu(x)",
    "parameters are not constants": f"h = Relu(beta) c = Conv(x, w) y = {BN}(c, gamma, h, mean, var) z = Relu(x)",
    "training mode": f"c = Conv(x, w) y, u, v = BatchNormalization<training_mode = 1>(c, {S}) z = Relu(x)",
}


@pytest.mark.parametrize("reason", BODIES)
def test_says_why_it_stays(reason):
    m = model(
        f"g (float[1,2,4,4] x, float[2,2,1,1] w, {norm_inputs(2)}) => (float[1,2,4,4] y, float[1,2,4,4] z)"
        f"{{ {BODIES[reason]} }}",
        w=weights(2, 2, 1, 1),
        **norm(2),
    )
    before = ops(m)
    assert FoldBatchNorm()(m) == 0
    assert ops(m) == before
    (name,) = [node.name for node in graph.nodes(m, "BatchNormalization")]
    assert reason in FoldBatchNorm().refused(m)[name]


def test_leaves_the_training_form_of_old_operator_sets():
    m = model(
        f"""g (float[1,2,4,4] x, float[2,2,1,1] w, {norm_inputs(2)}) => (float[1,2,4,4] y) {{
            c = Conv(x, w) y, m1, v1, m2, v2 = {BN}(c, {S})
        }}""",
        opset=13,
        w=weights(2, 2, 1, 1),
        **norm(2),
    )
    assert FoldBatchNorm()(m) == 0
    assert "training mode" in next(iter(FoldBatchNorm().refused(m).values()))


def test_leaves_a_sum_that_is_not_a_bias():
    m = model(
        f"""g (float[2,5] x, float[2,3] z, float[5,3] w, {norm_inputs(3)}) => (float[2,3] y) {{
            c = MatMul(x, w) d = Add(c, z) y = {BN}(d, {S})
        }}""",
        w=weights(5, 3),
        **norm(3),
    )
    assert FoldBatchNorm()(m) == 0
    assert "not a bias" in next(iter(FoldBatchNorm().refused(m).values()))


def test_leaves_a_batched_matrix_product_whose_channels_are_another_axis():
    m = model(
        f"""g (float[2,3,5] x, float[5,3] w, {norm_inputs(3)}) => (float[2,3,3] y) {{
            c = MatMul(x, w) y = {BN}(c, {S})
        }}""",
        w=weights(5, 3),
        **norm(3),
    )
    graph.infer_shapes(m)
    assert FoldBatchNorm()(m) == 0
    assert "another axis" in next(iter(FoldBatchNorm().refused(m).values()))


@pytest.mark.parametrize(
    ("parameter", "value", "reason"), [("var", -0.2, "not positive"), ("gamma", 3e38, "too large")]
)
def test_leaves_parameters_that_do_not_fold(parameter, value, reason):
    constants = norm(2)
    constants[parameter][1] = value
    m = model(
        f"""g (float[1,2,4,4] x, float[2,2,1,1] w, {norm_inputs(2)}) => (float[1,2,4,4] y) {{
            c = Conv(x, w) y = {BN}(c, {S})
        }}""",
        w=weights(2, 2, 1, 1) * 100,
        **constants,
    )
    assert FoldBatchNorm()(m) == 0
    assert reason in next(iter(FoldBatchNorm().refused(m).values()))
