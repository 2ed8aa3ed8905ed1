"""What each target wants on grids, and on which."""

import numpy as np
import pytest
from helpers import model, weights
from planning import integer, planned

from onnxq import graph
from onnxq.plan import Precision, place
from onnxq.plan.half import block_layers, half_plan
from onnxq.types import BlockGrid
from onnxq.types.target import CPU, CUDA, OPENVINO, QNN, TARGETS, TENSORRT, WEB, target_of

RESIDUAL = """g (float[N,3,8,8] x, float[6,3,3,3] w1, float[6,6,3,3] w2, float[6,6,3,3] w3, float[6,6,1,1] w4,
    float[6] b) => (float[N,6] y) {
    c1 = Conv<pads = [1,1,1,1]>(x, w1, b)    r1 = Relu(c1)
    c2 = Conv<pads = [1,1,1,1]>(r1, w2, b)   r2 = Relu(c2)
    c3 = Conv<pads = [1,1,1,1]>(r2, w3)      s1 = Add(r1, c3)    r3 = Relu(s1)
    c4 = Conv<pads = [1,1,1,1]>(r3, w2)      r4 = Relu(c4)
    c5 = Conv<pads = [1,1,1,1]>(r4, w3)      d = Conv(r3, w4)    s2 = Add(d, c5)    r5 = Relu(s2)
    p = GlobalAveragePool(r5)                y = Flatten(p)
}"""
ARRAYS = {
    "w1": weights(6, 3, 3, 3), "w2": weights(6, 6, 3, 3), "w3": weights(6, 6, 3, 3, seed=2), "w4": weights(6, 6, 1, 1),
    "b": weights(6),
}  # fmt: skip
X = {"x": weights(4, 3, 8, 8)}
MASKED = """g (float[N,5,8] x, int64[N,5] mask, float[8,8] wq, float[8,8] wk, float[8,8] wv, float[8] bq, float[8] g,
    float[8] s, float k, float one, int64[1] axis) => (float[N,5,8] y) {
    n = LayerNormalization(x, g, s)
    q0 = MatMul(n, wq)  q = Add(q0, bq)  k0 = MatMul(n, wk)  v = MatMul(n, wv)
    kt = Transpose<perm = [0,2,1]>(k0)  scores = MatMul(q, kt)
    m0 = Unsqueeze(mask, axis)  m1 = Cast<to = 1>(m0)  m2 = Sub(one, m1)  m3 = Mul(m2, k)
    masked = Add(scores, m3)  a = Softmax(masked)  y0 = MatMul(a, v)  y = Tanh(y0)
}"""
MASKED_ARRAYS = {
    "wq": weights(8, 8), "wk": weights(8, 8, seed=1), "wv": weights(8, 8, seed=2), "bq": weights(8),
    "g": weights(8, seed=3), "s": weights(8, seed=4), "k": np.float32(-10000), "one": np.float32(1),
    "axis": np.array([1]),
}  # fmt: skip
MASKED_X = {"x": weights(2, 5, 8), "mask": np.ones((2, 5), np.int64)}


def names(made, *op_types):
    return [str(node.name) for node in graph.nodes(made, *op_types)]


def test_every_name_is_a_target_and_auto_is_this_processor():
    assert list(TARGETS) == ["cpu", "tensorrt", "cuda", "openvino", "qnn", "web"]
    assert all(target.name == name for name, target in TARGETS.items())
    assert target_of("auto") is CPU
    assert target_of("qnn") is QNN
    with pytest.raises(KeyError):
        target_of("tpu")


def test_the_cpu_is_what_it_was_and_the_web_is_like_it():
    made = model(RESIDUAL, **ARRAYS)
    plain, web = place(made), place(made, target=WEB)
    assert integer(plain) == integer(web)
    assert plain.tensors == web.tensors
    assert (plain.guards, plain.sums) == (web.guards, web.sums)


def test_tensorrt_quantizes_inputs_of_layers_and_one_operand_of_a_residual_addition():
    made = model(RESIDUAL, **ARRAYS)
    placement = place(made, target=TENSORRT)
    convolutions, additions = names(made, "Conv"), names(made, "Add")
    assert integer(placement) == [name for name in names(made) if name in (*convolutions, *additions)]
    assert placement.tensors == ("x", "r1", "r2", "r3", "r4", "d")  # the deeper of two convolutions is fused
    assert not placement.fixed
    assert not placement.guards
    plan = planned(made, X, target=TENSORRT)
    assert plan.target == "tensorrt"
    assert {grid.zero_point for grid in plan.tensors.values()} == {0}
    assert all(grid.signed and grid.bits == 8 and not grid.everywhere for grid in plan.tensors.values())
    assert all(grid.axis == 0 and len(grid.scales) == 6 for grid in plan.weights.values())


@pytest.mark.parametrize(
    ("text", "quantized"),
    [
        ("t = Tanh(x)  c = Conv(x, w)  r = Relu(c)  y = Add(t, r)", ("x",)),  # the activation stands between
        (
            "t = Tanh(x)  c = Conv(x, w)  a = Add(t, c)  y = Mul(a, c)",
            ("x",),
        ),  # somebody else reads the convolution's result
        ("t = Tanh(x)  c = Conv(x, w)  y = Add(c, t)", ("x", "t")),
        ("t = Tanh(x)  c = Conv(x, w)  y = Add(t, c)", ("x", "t")),
        ("t = Tanh(x)  c = Conv(x, w)  y = Mul(t, c)", ("x",)),
        ("c = Conv(x, w)  y = Add(c, b)", ("x",)),
    ],
)
def test_only_an_addition_behind_a_bare_convolution_is_fused(text, quantized):
    made = model(
        f"g (float[N,4,5,5] x, float[4,4,1,1] w, float[4,1,1] b) => (float[N,4,5,5] y) {{ {text} }}",
        w=weights(4, 4, 1, 1),
        b=weights(4, 1, 1),
    )
    assert place(made, target=TENSORRT).tensors == quantized


def test_tensorrt_takes_layers_that_are_slow_on_cpus_and_leaves_what_was_asked_for():
    made = model(
        """g (float[N,16,6,6] x, float[16,2,3,3] w, float[16,1,3,3] v) => (float[N,16,2,2] y) {
            c = Conv<group = 8>(x, w)  y = Conv<group = 16>(c, v) }""",
        w=weights(16, 2, 3, 3),
        v=weights(16, 1, 3, 3),
    )
    first, second = names(made)
    assert not integer(place(made))
    assert integer(place(made, target=TENSORRT)) == [first, second]
    kept = place(made, target=TENSORRT, keep_float=[first])
    assert integer(kept) == [second]
    assert kept.skipped[first] == "asked to stay in float"
    refused = place(made, target=TENSORRT, refuse={"c": "no"})
    assert integer(refused) == [first]
    assert refused.skipped[second] == "no"


def test_openvino_is_placed_like_the_cpu_without_what_only_its_optimiser_needs():
    made = model(RESIDUAL, **ARRAYS)
    plain, other = place(made), place(made, target=OPENVINO)
    assert integer(plain) == integer(other)
    assert plain.tensors == other.tensors
    assert not other.guards
    assert not other.sums
    plan = planned(made, X, target=OPENVINO)
    assert not any(grid.signed for grid in plan.tensors.values())


def test_an_npu_gets_everything_but_what_a_mask_touches():
    made = model(MASKED, opset=17, **MASKED_ARRAYS)
    placement = place(made, target=QNN)
    floats = {node.outputs[0].name for node in graph.nodes(made) if node.name in placement.skipped}
    assert floats == {"m0", "m1", "m2", "m3", "masked", "a"}
    assert placement.tensors == ("x", "n", "q0", "q", "k0", "v", "kt", "scores", "a", "y0", "y")
    assert placement.fixed == set(placement.tensors) - {"x", "a"}
    plan = planned(made, MASKED_X, Precision(activation_bits=16), target=QNN)
    assert {grid.bits for grid in (*plan.tensors.values(), *plan.constants.values())} == {16}
    assert set(plan.constants) == {"bq", "g"}
    assert all(grid.axis is None for grid in plan.weights.values())
    assert plan.tensors["kt"].scale == plan.tensors["k0"].scale


def test_an_npu_has_steps_per_channel_for_convolutions_alone():
    made = model(
        """g (float[N,3,4,4] x, float[5,3,1,1] w, float[5,2,2,2] t, float[32,7] f) => (float[N,7] y) {
            c = Conv(x, w)  u = ConvTranspose<strides = [2,2]>(c, t)
            p = MaxPool<kernel_shape = [2,2], strides = [2,2]>(u)
            h = Flatten(p)  k = MatMul(h, f)  y = Tanh(k) }""",
        w=weights(5, 3, 1, 1),
        t=weights(5, 2, 2, 2),
        f=weights(32, 7),
    )  # fmt: skip
    plan = planned(made, {"x": weights(3, 3, 4, 4)}, target=QNN)
    kinds = {graph.node_names(made)[name].op_type: (grid.axis, len(grid.scales)) for name, grid in plan.weights.items()}
    assert kinds == {"Conv": (0, 5), "ConvTranspose": (None, 1), "MatMul": (None, 1)}
    assert not plan.skipped


def test_constants_out_of_proportion_and_unknown_operators_stay_float_on_an_npu():
    made = model(
        """g (float[N,4] x, float[4,4] w, float k, float z) => (float[N,4] y) {
            h = MatMul(x, w)  a = Mul(h, k)  b = Sin(a)  y = Mul(b, z) }""",
        w=weights(4, 4),
        k=np.float32(-1e6),
        z=np.float32(1.5),
    )
    placement = place(made, target=QNN)
    product, huge, sine, scaled = names(made)
    assert integer(placement) == [product, scaled]
    assert "out of proportion" in placement.skipped[huge]
    assert "Sin" in placement.skipped[sine]


def half_names(made, plan):
    return {node.outputs[0].name for node in graph.nodes(made) if node.name in plan.half}


def spans(made, feeds):
    from onnxq.calibrate import extremes

    return extremes(made, [feeds])


def test_half_precision_is_for_what_float16_holds():
    made = model(MASKED, opset=17, **MASKED_ARRAYS)
    plan = half_plan(made, spans(made, MASKED_X), CUDA)
    assert half_names(made, plan) == {"q0", "q", "k0", "v", "kt", "scores", "y0", "y", "m2", "m3", "masked"}
    padded = dict(MASKED_X, mask=np.array([[1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]))
    loud = half_plan(made, {**spans(made, padded), "m3": (-3e4, 0.0)}, CUDA)
    assert half_names(made, loud) == {"q0", "q", "k0", "v", "kt", "scores", "y0", "y"}
    assert any("near the end of float16" in reason for reason in loud.skipped.values())


def test_half_precision_leaves_what_cannot_be_rounded_is_unknown_or_was_asked_for():
    made = model(
        """g (float[N,4] x, float[4,4] w, float[4,4] v, float[4,4] u, float k) => (float[N,4] y) {
            a = MatMul(x, w)  b = MatMul(a, v)  c = MatMul(b, u)  d = Mul(c, k)  e = Softmax(d)  y = Add(e, k) }""",
        w=weights(4, 4) * np.float32(1e-9),
        v=weights(4, 4),
        u=weights(4, 4),
        k=np.float32(0.3),
    )
    nodes = names(made)
    ranges = dict.fromkeys(("x", "a", "b", "c", "d", "e", "y"), (-1.0, 1.0))
    plan = half_plan(made, ranges, CUDA)
    assert half_names(made, plan) == {"b", "c", "d"}
    assert "cannot hold" in plan.skipped[nodes[0]]
    assert plan.skipped[nodes[5]] == plan.skipped[nodes[4]]  # an addition alone is not worth two Casts
    del ranges["b"]
    assert half_names(made, half_plan(made, ranges, CUDA)) == set()
    ranges["b"] = (-1.0, 1.0)
    assert half_names(made, half_plan(made, ranges, CUDA, keep_float=[nodes[1]])) == {"c", "d"}


def test_blocks_are_for_products_whose_inputs_fill_them():
    made = model(
        """g (float[N,256] x, float[256,100] a, float[100,40] b, float[40,16] c, float[5,16] d) => (float[N,5] y) {
            h = MatMul(x, a)  i = MatMul(h, b)  j = MatMul(i, c)  y = Gemm<transB = 1>(j, d) }""",
        a=weights(256, 100),
        b=weights(100, 40),
        c=weights(40, 16),
        d=weights(5, 16),
    )
    first, second, third, _ = wanted = names(made)
    assert block_layers(made, TENSORRT, wanted) == {first: BlockGrid(4, 128)}
    assert block_layers(made, CUDA, wanted) == {name: BlockGrid(4, 32) for name in (first, second, third)}
    assert block_layers(made, CUDA, [second]) == {second: BlockGrid(4, 32)}
    assert block_layers(made, CPU, wanted) == {}
