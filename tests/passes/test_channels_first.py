import numpy as np
import pytest
from helpers import assert_same_outputs, model, ops, run, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq import graph
from onnxq.passes import apply
from onnxq.passes.channels_first import ChannelsFirst

X = weights(2, 5, 6, 3)  # N, H, W, C
FIRST, LAST = "<perm = [0, 3, 1, 2]>", "<perm = [0, 2, 3, 1]>"
CONVS = {"w": weights(4, 3, 3, 3), "b": weights(4), "v": weights(4, 4, 1, 1, seed=1)}
DECLARED = "float[4,3,3,3] w, float[4] b, float[4,4,1,1] v"
STEM = f"a = Transpose {FIRST} (x) c = Conv <pads = [1, 1, 1, 1]> (a, w, b) f = Transpose {LAST} (c)"


def check(text, transposes, feeds=None, opset=17, **constants):
    """Run the pass; the outputs stay, `transposes` Transposes are left, and a second call finds nothing."""
    made = model(text, opset=opset, **constants)
    graph.infer_shapes(made)
    feeds = {"x": X} if feeds is None else feeds
    outputs = [(value.name, [str(size) for size in value.shape]) for value in made.graph.outputs]
    before, count = run(made, feeds), ops(made).count("Transpose")
    applied = apply(made, [ChannelsFirst()], feeds)[0]
    assert ops(made).count("Transpose") == transposes
    assert applied.count == count - transposes
    assert_same_outputs(before, run(made, feeds))
    assert [(value.name, [str(size) for size in value.shape]) for value in made.graph.outputs] == outputs
    assert ChannelsFirst()(made) == 0
    return made


def conv_op_conv(node, transposes=2, opset=17, last="float[n,h,w,4] y", declared="", **constants):
    """x -> Conv -> `node` from f to g, in channels-last -> 1x1 Conv -> y."""
    text = f"g (float[2,5,6,3] x, {DECLARED}{declared}) => ({last}) {{ {STEM} {node} i = Transpose {FIRST} (g)"
    return check(f"{text} j = Conv(i, v) y = Transpose {LAST} (j) }}", transposes, opset=opset, **CONVS, **constants)


@pytest.mark.parametrize(
    "node",
    [
        "g = Relu(f)",
        "g = Softmax <axis = 3> (f)",
        "g = Softmax <axis = -3> (f)",
        "h = Sigmoid(f) g = Mul(f, h)",
        "h = Concat <axis = 1> (f, f) k = Relu(h) g = Concat <axis = 2> (h, k)",
        "h, k = Split <axis = 2> (f) g = Add(h, k)",
        "h = ReduceMax <axes = [1], keepdims = 1> (f) g = Sub(f, h)",
        "h = ReduceMean <axes = [2, 3], keepdims = 1> (f) g = Div(f, h)",
    ],
)
def test_operators_between_convs_work_channels_first(node):
    made = conv_op_conv(node)
    assert ops(made)[0] == ops(made)[-1] == "Transpose"


def test_the_value_a_transpose_joins_the_convs_by_itself():
    conv_op_conv("g = Identity(f)")


@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 1, 4), (6, 1), (5, 6, 4), (1, 5, 1, 1), (2, 5, 6, 4)])
@pytest.mark.parametrize("node", ["Add(f, k)", "Sub(k, f)", "Max(f, k, f)"])
def test_constants_are_transposed_along(shape, node):
    conv_op_conv(f"g = {node}", declared=f", float{list(shape) if shape else ''} k", k=weights(*shape, seed=7))


def test_a_slope_and_a_condition_are_transposed_along():
    slope, mask = weights(1, 1, 4, low=0.1, high=0.9), weights(5, 1, 4) > 0
    node = "h = PRelu(f, k) g = Where(m, h, f)"
    conv_op_conv(node, declared=", float[1,1,4] k, bool[5,1,4] m", k=slope, m=mask)


def test_a_constant_with_other_readers_keeps_its_layout_for_them():
    text = f"g (float[2,5,6,3] x, float[5,6,3] k) => (float[2,5,6,3] y, float[5,6,3] z) {{ a = Transpose {FIRST} (x)"
    text += f" b = Sigmoid(a) c = Transpose {LAST} (b) d = Add(c, k) e = Transpose {FIRST} (d) f = Exp(e)"
    check(f"{text} y = Transpose {LAST} (f) z = Neg(k) }}", 0, k=weights(5, 6, 3))


def test_pads_slices_and_resizes_are_reordered():
    pads = np.array([0, 1, 2, 3, 0, 4, 5, 6], np.int64)
    conv_op_conv(
        "h = Pad(f, p, k) g = Slice(h, s, e, l, t)",
        declared=", int64[8] p, float k, int64[2] s, int64[2] e, int64[2] l, int64[2] t",
        p=pads,
        k=np.float32(0.7),
        s=np.array([3, 1], np.int64),
        e=np.array([7, 9], np.int64),
        l=np.array([3, -2], np.int64),
        t=np.array([1, 2], np.int64),
        last="float[n,h,w,4] y",
    )


@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_a_slice_without_axes_gets_them(kind):
    bounds = {"s": np.array([1, 2], kind), "e": np.array([2, 4], kind)}
    conv_op_conv("g = Slice(f, s, e)", declared=f", {kind}[2] s, {kind}[2] e", **bounds)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("sizes", [False, True])
def test_a_resize_is_reordered(mode, sizes):
    given = np.array([2, 7, 12, 4], np.int64) if sizes else np.array([1, 2, 3, 1], np.float32)
    node = f'g = Resize <mode = "{mode}"> (f, , {", k" if sizes else "k"})'
    conv_op_conv(node, declared=f", {'int64' if sizes else 'float'}[4] k", k=given)


@pytest.mark.parametrize(("op", "opset"), [("ReduceMin", 18), ("ReduceSum", 13)])
def test_axes_as_an_input(op, opset):
    node = f"h = {op}(f, k) g = Sub(f, h)"
    conv_op_conv(node, opset=opset, declared=", int64[1] k", k=np.array([-2], np.int64))


def test_a_computed_vector_cannot_be_re_laid():
    conv_op_conv(
        "s = Exp(b) t = Dropout(s) h = Reshape(t, k) g = Mul(f, h)", 4, declared=", int64[1] k", k=np.array([4])
    )


def test_a_constant_with_more_axes_is_left():
    text = f"g (float[2,5,6,3] x, float[2,1,1,1,4] k, {DECLARED}) => (float[a,n,h,w,i] y) {{ {STEM} y = Add(f, k) }}"
    check(text, 2, k=weights(2, 1, 1, 1, 4), **CONVS)


def test_a_residual_block_with_squeeze_and_excite_keeps_the_outer_transposes_only():
    text = f"g (float[2,5,6,3] x, {DECLARED}) => (float[n,h,w,4] y) {{ {STEM} g = Relu(f)"
    text += f" m = ReduceMean <axes = [1, 2], keepdims = 1> (g) n = Transpose {FIRST} (m) o = Conv(n, v)"
    text += f" p = Transpose {LAST} (o) q = Sigmoid(p) r = Mul(g, q) s = Transpose {FIRST} (r) t = Conv(s, v)"
    made = check(f"{text} u = Transpose {LAST} (t) y = Add(u, g) }}", 2, **CONVS)
    assert "Reshape" not in ops(made)


def test_a_global_mean_without_kept_axes_has_no_layout():
    text = f"g (float[2,5,6,3] x, {DECLARED}) => (float[2,4] y) {{ {STEM}"
    made = check(f"{text} y = ReduceMean <axes = [1, 2], keepdims = 0> (f) }}", 1, **CONVS)
    assert graph.attribute(next(graph.nodes(made, "ReduceMean")), "axes", None) == [2, 3]


def test_a_mean_over_one_side_of_the_picture_keeps_its_transpose():
    text = f"g (float[2,5,6,3] x, {DECLARED}) => (float[2,6,4] y) {{ {STEM}"
    check(f"{text} y = ReduceMean <axes = [1], keepdims = 0> (f) }}", 2, **CONVS)


def test_a_kept_mean_before_a_reshape_needs_no_transpose():
    text = f"g (float[2,5,6,3] x, int64[2] k, {DECLARED}) => (float[2,4] y) {{ {STEM}"
    text += " m = ReduceMean <axes = [1, 2], keepdims = 1> (f) y = Reshape(m, k) }"
    check(text, 1, k=np.array([2, 4], np.int64), **CONVS)


@pytest.mark.parametrize("shape", ["n,7,5,1", "n,1,1,9"])
def test_a_transpose_that_moves_axes_of_size_one_is_a_reshape(shape):
    sizes = [3, *map(int, shape.split(",")[1:])]
    text = f"g (float[{shape}] x) => (float[a,b,c,d] y) {{ y = Transpose {FIRST} (x) }}"
    made = check(text, 0, feeds={"x": weights(*sizes)})
    assert ops(made) == ["Reshape"]


def test_a_part_in_channels_first_is_turned_when_all_around_is_channels_last():
    text = f"g (float[2,5,6,3] x) => (float[2,5,6,3] y) {{ a = Transpose {FIRST} (x) b = Softmax <axis = 1> (a)"
    made = check(f"{text} y = Transpose {LAST} (b) }}", 0)
    assert graph.attribute(next(graph.nodes(made, "Softmax")), "axis", None) == 3


def test_only_the_side_that_pays_is_turned():
    """Two Convs lie on one side of the Relu, two inputs of the model on the other."""
    text = f"g (float[2,5,6,3] x, float[2,5,6,4] s, float[2,5,6,4] t, {DECLARED}) => (float[n,h,w,4] y) {{ {STEM}"
    text += f" g = Relu(f) i = Transpose {FIRST} (g) j = Conv(i, v) k = Transpose {LAST} (j) l = Add(g, k)"
    text += " m = Add(s, t) o = Mul(s, t) p = Sub(m, o) y = Mul(l, p) }"
    feeds = {"x": X, "s": weights(2, 5, 6, 4, seed=3), "t": weights(2, 5, 6, 4, seed=4)}
    made = check(text, 2, feeds=feeds, **CONVS)
    assert graph.producer(made.graph.outputs[0], "Mul")


def test_inner_outputs_of_the_model_keep_name_and_layout():
    text = f"g (float[2,5,6,3] x, {DECLARED}) => (float[2,5,6,4] r, float[n,h,w,4] y, float[n,4,i,j] d) {{ {STEM}"
    text += f" r = Relu(f) g = Exp(r) d = Transpose {FIRST} (g) e = Conv(d, v) y = Transpose {LAST} (e) }}"
    check(text, 3, **CONVS)


def test_two_outputs_that_become_one_tensor_stay_two_outputs():
    text = f"g (float[2,5,6,3] x, {DECLARED}) => (float[a,b,i,j] y, float[n,h,k,l] z) {{ {STEM} g = Relu(f)"
    check(f"{text} y = Transpose {FIRST} (g) z = Transpose {FIRST} (g) }}", 1, **CONVS)


def test_unknown_operators_and_ranks_are_refused_with_a_reason():
    text = f"g (float[2,5,6,3] x, int64[3] k, {DECLARED}) => (float[2,30,4] y) {{ {STEM} y = Reshape(f, k) }}"
    made = check(text, 2, k=np.array([2, 30, 4], np.int64), **CONVS)
    reasons = list(ChannelsFirst().refused(made).values())
    assert reasons[0] == "the layout of the model's input stays"
    assert reasons[1].endswith("(Reshape) needs its layout")


def test_bodies_of_branches_read_what_they_read_before():
    text = (
        f"g (float[2,5,6,3] x, bool choice, {DECLARED}) => (float[n,h,w,k] y, float[n,4,h,w] z) {{ {STEM} g = Relu(f)"
    )
    text += f" d = Transpose {FIRST} (g) z = Conv(d, v) y = If (choice) <"
    text += f"then_branch = t () => (float[n,i,j,k] p) {{ p = Transpose {FIRST} (g) }}, "
    text += "else_branch = e () => (float[n,i,j,k] q) { q = Neg(g) }> }"
    made = model(text, **CONVS)
    graph.infer_shapes(made)
    feeds = [{"x": X, "choice": np.array(choice)} for choice in (True, False)]
    before = [run(made, feed) for feed in feeds]
    assert ChannelsFirst()(made) == 1
    for feed, expected in zip(feeds, before, strict=True):
        assert_same_outputs(expected, run(made, feed))


def test_nothing_is_re_laid_to_tear_an_output_of_the_model():
    text = "g (float[2,1,1,3] x, float[5,6,1] k, float[4,3,3,3] w) => (float[2,5,6,3] r, float[2,4,3,4] y) { "
    made = check(
        f"{text} r = Mul(x, k) a = Transpose {FIRST} (r) y = Conv(a, w) }}",
        1,
        {"x": X[:, :1, :1]},
        k=weights(5, 6, 1),
        w=CONVS["w"],
    )
    assert ops(made) == ["Mul", "Transpose", "Conv"]


def test_sizes_that_are_not_known_cannot_be_written_in_a_reshape():
    text = f"g (float[n,h,w,1] x) => (float[n,1,h,w] y) {{ y = Transpose {FIRST} (x) }}"
    check(text, 1, feeds={"x": weights(2, 3, 4, 1)})


@pytest.mark.parametrize("outputs", [1, 2])
def test_a_transpose_that_is_an_output_of_the_model_serves_all(outputs):
    names = ["y", "z"][:outputs]
    declared = ", ".join(f"float[2,3,5,6] {name}" for name in names)
    text = f"g (float[2,5,6,3] x, float[4,3,3,3] w) => ({declared}, float[2,4,i,j] v) {{ "
    text += " ".join(f"{name} = Transpose {FIRST} (x)" for name in names)
    check(f"{text} a = Relu(x) b = Transpose {FIRST} (a) v = Conv(b, w) }}", 1, w=CONVS["w"])


def test_a_transpose_that_undoes_another_goes_with_it():
    text = f"g (float[2,5,6,3] x, int64[3] k) => (float[2,5,6,3] y, float[2,30,3] z) {{ a = Transpose {FIRST} (x)"
    text += f" y = Transpose {LAST} (a) b = Transpose {LAST} (a) z = Reshape(b, k) }}"
    made = check(text, 0, k=np.array([2, 30, 3], np.int64))
    assert sorted(ops(made)) == ["Identity", "Reshape"]


def test_attention_and_other_permutations_stay():
    text = "g (float[2,5,6,3] x) => (float[a,b,c,d] y) { a = Transpose <perm = [0, 2, 1, 3]> (x) b = Relu(a)"
    check(f"{text} y = Transpose <perm = [0, 2, 1, 3]> (b) }}", 2)


def test_a_relaid_tensor_that_is_also_read_past_a_transpose_the_other_way():
    """t is re-laid, and c wants what Transpose(Transpose(t)) gives: t as it was."""
    text = f"""g (float[2,4,4,4] x, float[4,4,1,1] v) => (float[2,4,4,4] y, float[2,4,4,4] z) {{
        p = Transpose {FIRST} (x) q = Conv(p, v) r = Transpose {LAST} (q) t = Relu(r) y = Softmax <axis = 2> (t)
        a = Transpose {LAST} (t) b = Relu(a) c = Transpose {FIRST} (b) d = Add(c, t)
        e = Transpose {FIRST} (d) f = Conv(e, v) z = Transpose {LAST} (f) }}"""
    made = model(text, v=CONVS["w"][:, :1, :1, :1].repeat(4, 1))
    graph.infer_shapes(made)
    feeds = {"x": weights(2, 4, 4, 4)}
    before = run(made, feeds)
    ChannelsFirst()(made)
    assert_same_outputs(before, run(made, feeds))


STEPS = {
    "{} = Relu({})": 1,
    "{} = Add({}, {})": 2,
    "{} = Mul({}, k)": 1,
    "{} = Softmax <axis = 2> ({})": 1,
    f"{{0}}a = Transpose {FIRST} ({{1}}) {{0}}b = Conv({{0}}a, v) {{0}} = Transpose {LAST} ({{0}}b)": 1,
    f"{{0}}a = Transpose {LAST} ({{1}}) {{0}}b = Relu({{0}}a) {{0}} = Transpose {FIRST} ({{0}}b)": 1,
    f"{{0}}a = Transpose {FIRST} ({{1}}) {{0}}b = LeakyRelu({{0}}a) {{0}} = Transpose {LAST} ({{0}}b)": 1,
    "{0}a = ReduceMean <axes = [3], keepdims = 1> ({1}) {0} = Sub({2}, {0}a)": 2,
    "{0}a, {0}b = Split <axis = 1> ({1}) {0} = Concat <axis = 1> ({0}b, {0}a)": 1,
}


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_graphs_keep_what_they_compute(data):
    values, nodes = ["x"], []
    for index in range(data.draw(st.integers(3, 9))):
        step = data.draw(st.sampled_from(sorted(STEPS)))
        sources = [data.draw(st.sampled_from(values[-3:])) for _ in range(STEPS[step])]
        nodes.append(step.format(f"t{index}", *sources))
        values.append(f"t{index}")
    outputs = {values[-1], data.draw(st.sampled_from(values[1:]))}
    text = (
        f"g (float[2,4,4,4] x, float[4,4] k, float[4,4,1,1] v) => ({', '.join(f'float[2,4,4,4] {o}' for o in outputs)})"
    )
    made = model(f"{text} {{ {' '.join(nodes)} }}", k=weights(4, 4), v=weights(4, 4, 1, 1))
    graph.infer_shapes(made)
    graph.remove_unused(made)
    feeds = {"x": weights(2, 4, 4, 4)}
    before, count = run(made, feeds), ops(made).count("Transpose")
    removed = ChannelsFirst()(made)
    graph.remove_unused(made)
    assert ops(made).count("Transpose") == count - removed
    assert_same_outputs(before, run(made, feeds))
    assert ChannelsFirst()(made) == 0
