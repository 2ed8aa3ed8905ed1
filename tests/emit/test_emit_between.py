"""What lies between layers: sums, pools, activations and moves in integer kernels."""

import re
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from emitting import assert_good, kernels, quantized, stored
from helpers import model, run, weights

from onnxq import graph, runtime
from onnxq.emit import emit
from onnxq.grid import Grid
from onnxq.pipeline.verify import kernel_gap
from onnxq.plan import place
from onnxq.types.target import TARGETS

CONSTANTS = {
    "k": ("float[1,6,1,1]", weights(1, 6, 1, 1)),
    "full": ("float[2,6,7,7]", weights(2, 6, 7, 7)),
    "col": ("float[2,6,1,7]", weights(2, 6, 1, 7)),
    "minus": ("float", np.float32(-0.7)),
    "half": ("float", np.float32(0.5)),
    "two": ("float", np.float32(2)),
    "three": ("float", np.float32(3.3)),
    "shape": ("int64[4]", np.asarray([0, 3, 2, -1])),
    "size": ("int64[4]", np.asarray([2, 6, 7, 7])),
    "repeat": ("int64[4]", np.asarray([1, 1, 2, 1])),
    "rows": ("int64[3]", np.asarray([0, -1, 3])),
    "a": ("int64[1]", np.asarray([-1])),
    "b": ("int64[1]", np.asarray([-100])),
    "c": ("int64[1]", np.asarray([3])),
    "d": ("int64[1]", np.asarray([-2])),
    "parts": ("int64[2]", np.asarray([2, 4])),
    "scales": ("float[4]", np.asarray([1, 1, 2, 1.5], np.float32)),
    "window": ("float[8]", np.asarray([0, 0, -0.3, -0.2, 1, 1, 1.3, 1.2], np.float32)),
}


def between(body, opset=17, dims=2, output="i", channels=6):
    """Conv -> `body`, which turns h into `output` -> Conv, called first and last."""
    space, ones = ",".join("9" * dims), ",".join("1" * dims)
    words = set(re.findall(r"\w+", re.sub(r"<[^>]*>|\[\w+\]", " ", body)))
    used = {name: kind for name, (kind, _) in CONSTANTS.items() if name in words}
    inputs = "".join(f", {kind} {name}" for name, kind in used.items())
    text = f"""g (float[2,3,{space}] x, float[6,3,{",".join("3" * dims)}] w, float[4,{channels},{ones}] u{inputs})
        => (float[2,4,{",".join("pqr"[:dims])}] y) {{ [first] h = Conv(x, w) {body} [last] y = Conv({output}, u) }}"""
    arrays = {name: CONSTANTS[name][1] for name in used}
    made = model(text, opset, w=weights(6, 3, *[3] * dims), u=weights(4, channels, *[1] * dims), **arrays)
    return made, {"x": weights(2, 3, *[9] * dims, seed=5)}


@pytest.mark.parametrize(
    ("op", "kernel"),
    [
        ("Add(h, h)", "QLinearAdd"),
        ("Add(h, k)", "QLinearAdd"),
        ("Add(full, h)", "QLinearAdd"),
        ("Add(h, minus)", "QLinearAdd"),
        ("Mul(h, h)", "QLinearMul"),
        ("Mul(k, h)", "QLinearMul"),
        ("Mul(h, minus)", "QLinearMul"),
        ("LeakyRelu<alpha = 0.3>(h)", "QLinearLeakyRelu"),
        ("LeakyRelu<alpha = -0.3>(h)", "QLinearLeakyRelu"),
        ("LeakyRelu<alpha = 1.5>(h)", "QLinearLeakyRelu"),
        ("Sigmoid(h)", "QLinearSigmoid"),
        ("GlobalAveragePool(h)", "QLinearGlobalAveragePool"),
        ("Concat<axis = -2>(h, h)", "QLinearConcat"),
        ("Concat<axis = 2>(h, col)", "QLinearConcat"),
        ("Transpose<perm = [0, 1, 3, 2]>(h)", "Transpose"),
        ("Tile(h, repeat)", "Tile"),
        ("Expand(h, size)", None),
        ("Gather<axis = 2>(h, rows)", "Gather"),
        ("Slice(h, a, b, c, d)", "Slice"),
        ("Clip(h, minus, three)", None),
        ("Clip(h, , three)", None),
        ("Clip(h, minus)", None),
        ("Relu(h)", None),
    ],
)
def test_an_operator_runs_in_integers(op, kernel):
    m, feeds = between(f"[n] i = {op}")
    plan, _, ran = assert_good(m, feeds)
    assert plan.skipped == {}
    assert ran.count("QLinearConv") == 2
    assert ran.count("QuantizeLinear") == ran.count("DequantizeLinear") == 1
    assert kernel is None or kernel in ran


@pytest.mark.parametrize(("low", "high"), [("half", "two"), ("two", "three")])
def test_a_clip_whose_interval_is_without_zero_is_right(low, high):
    m, feeds = between(f"i = Clip(h, {low}, {high})")
    assert_good(m, feeds, least=15)


@pytest.mark.parametrize(("dims", "shape"), [(1, "[2]"), (2, "[2, 3]"), (3, "[2, 1, 2]")])
def test_a_max_pool_runs_on_codes(dims, shape):
    m, feeds = between(f"i = MaxPool<kernel_shape = {shape}>(h)", dims=dims)
    plan, _, ran = assert_good(m, feeds)
    assert plan.tensors["h"].scale == plan.tensors["i"].scale
    assert plan.tensors["h"].zero_point == plan.tensors["i"].zero_point
    assert "NhwcMaxPool" in ran
    assert ran.count("QuantizeLinear") == 1


@pytest.mark.parametrize(("ceil", "dilation", "pad"), list(product((0, 1), (1, 2), (0, 1))))
def test_any_max_pool_is_right(ceil, dilation, pad):
    pads, dilations = [pad] * 4, [dilation] * 2
    op = f"MaxPool<kernel_shape=[3,3], strides=[2,2], pads={pads}, ceil_mode={ceil}, dilations={dilations}>(h)"
    _, _, ran = assert_good(*between(f"i = {op}"))
    assert "NhwcMaxPool" in ran


@pytest.mark.parametrize(("include", "ceil", "pad", "stride"), list(product((0, 1), (0, 1), (0, 1), (2, 3))))
def test_any_average_pool_is_right(include, ceil, pad, stride):
    """The runtime's integer kernel is wrong where ceil_mode adds a window and padding counts: that one stays float."""
    op = f"""AveragePool<kernel_shape = [3, 3], strides = {[stride] * 2}, pads = {[pad] * 4}, ceil_mode = {ceil},
                         count_include_pad = {include}>(h)"""
    plan, _, ran = assert_good(*between(f"[n] i = {op}", opset=19))
    assert ("QLinearAveragePool" in ran) == (not (include and ceil))
    assert ("n" in plan.skipped) == bool(include and ceil)


def test_a_dilated_average_pool_stays_float():
    """The runtime's integer kernel refuses to load."""
    m, feeds = between("[n] i = AveragePool<kernel_shape = [2, 2], dilations = [2, 2]>(h)", opset=19)
    _, _, ran = assert_good(m, feeds)
    assert "AveragePool" in ran


@pytest.mark.parametrize("dims", [1, 3])
def test_average_pools_of_other_ranks_are_right(dims):
    assert_good(*between(f"i = AveragePool<kernel_shape = {[2] * dims}>(h)", dims=dims))
    assert_good(*between("i = GlobalAveragePool(h)", dims=dims))


@pytest.mark.parametrize("mode", ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"])
@pytest.mark.parametrize("nearest", ["round_prefer_floor", "floor", "ceil"])
def test_a_nearest_resize_runs_on_codes(mode, nearest):
    op = f'Resize<mode = "nearest", coordinate_transformation_mode = "{mode}", nearest_mode = "{nearest}">(h, , scales)'
    _, _, ran = assert_good(*between(f"i = {op}"))
    assert ran.count("QuantizeLinear") == 1


def test_a_cropping_resize_fills_in_the_right_value():
    op = 'Resize<mode = "nearest", coordinate_transformation_mode = "tf_crop_and_resize", extrapolation_value = -30.0>'
    m, feeds = between(f"i = {op}(h, window, scales)")
    assert_good(m, feeds, least=30)


def test_shapes_may_change_on_codes():
    m, feeds = between("[n] j = Reshape(h, shape) i = Transpose<perm = [0, 2, 1, 3]>(j)", channels=2)
    plan, _, ran = assert_good(m, feeds)
    assert plan.skipped == {}
    assert ran.count("QuantizeLinear") == 1


def test_depth_to_space_runs_on_codes():
    text = """g (float[2,3,5,5] x, float[8,3,3,3] w, float[4,2,1,1] u) => (float[2,4,6,6] y) {
        h = Conv(x, w) [n] i = DepthToSpace<blocksize = 2, mode = "CRD">(h) y = Conv(i, u)
    }"""
    m = model(text, w=weights(8, 3, 3, 3), u=weights(4, 2, 1, 1))
    _, _, ran = assert_good(m, {"x": weights(2, 3, 5, 5, seed=5)})
    assert ran.count("QuantizeLinear") == 1


def test_a_split_runs_on_codes():
    m, feeds = between("[s] p, q = Split<axis = 1>(h, parts) [j] i = Concat<axis = 1>(q, p)")
    plan, _, ran = assert_good(m, feeds)
    assert {"Split", "QLinearConcat"} <= set(ran)
    assert len({grid.scale for name, grid in plan.tensors.items() if name in "hpqi"}) == 1


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("activation", ["", "j = Relu(i)", "j = Clip(i, minus, three)"])
def test_a_residual_addition_is_one_kernel(swapped, activation):
    operands = "g0, h" if swapped else "h, g0"
    body = f"g0 = LeakyRelu<alpha = 0.1>(h) [n] i = Add({operands}) {activation}"
    _, _, ran = assert_good(*between(body, output="j" if activation else "i"))
    assert "QLinearAdd" in ran
    assert not {"Add", "Relu", "Clip"} & set(ran)


def test_a_sum_of_two_convolutions_is_one_kernel():
    text = """g (float[2,3,8,8] x, float[6,3,3,3] w, float[6,3,3,3] v, float[4,6,1,1] u) => (float[2,4,6,6] y) {
        h = Conv(x, w) i = Conv(x, v) s = Add(h, i) r = Relu(s) y = Conv(r, u)
    }"""
    m = model(text, w=weights(6, 3, 3, 3), v=10 * weights(6, 3, 3, 3, seed=1), u=weights(4, 6, 1, 1))
    _, _, ran = assert_good(m, {"x": weights(2, 3, 8, 8, seed=5)})
    assert ran.count("QLinearConv") == 3
    assert ran.count("QLinearAdd") == 1
    assert not {"Add", "Relu"} & set(ran)


SILUS = ["[g] s = Sigmoid(h) [m] i = Mul(h, s)", "[g] s = Sigmoid(h) [m] i = Mul(s, h)"]


@pytest.mark.skipif(not runtime.fuses_silu(), reason="onnxruntime below 1.30")
@pytest.mark.parametrize("body", SILUS)
def test_silu_is_one_float_pass_between_grids(body):
    m, feeds = between(body)
    plan, paired, ran = assert_good(m, feeds)
    assert "m" in plan.integer
    assert {"h", "i"} <= set(plan.tensors)
    assert "s" not in plan.tensors
    assert not {"QLinearSigmoid", "QLinearMul"} & set(ran)
    written = emit(m, plan, fused=True)
    assert [node.op_type for node in written.graph if node.name == "m"] == ["QuickGelu"]
    ran = kernels(written)
    assert ran.count("Transpose") == 2  # to the kernels' layout and back; SiLU works in it
    inner = ["QLinearConv", "DequantizeLinear", "QuickGelu", "QuantizeLinear", "QLinearConv"]
    assert [kind for kind in ran if kind != "Transpose"] == ["QuantizeLinear", *inner, "DequantizeLinear"]
    assert kernel_gap(written, feeds) <= 1
    wanted, got = (run(file, feeds, optimize="all")["y"] for file in (paired, written))
    assert np.abs(wanted - got).max() <= 1.01 * plan.tensors["y"].scale


@pytest.mark.parametrize("kept", ["g", "m"])
def test_a_silu_of_which_a_node_stays_float_is_two_units(kept):
    m, _ = between(SILUS[0])
    placement = place(m, keep_float=[kept])
    assert placement.skipped[kept] == "asked to stay in float"
    assert {"g", "m"} <= {unit.name for unit in placement.units}


def test_silu_is_two_kernels_in_older_runtimes(monkeypatch):
    monkeypatch.setattr(runtime, "version", lambda: "1.29.1")
    _, _, ran = assert_good(*between(SILUS[0]))
    assert {"QLinearSigmoid", "QLinearMul"} <= set(ran)


def test_silu_is_two_kernels_where_the_target_has_no_better():
    m, feeds = between(SILUS[0])
    plan, emitted, ran = assert_good(m, feeds, target=TARGETS["web"])
    assert {"QLinearSigmoid", "QLinearMul"} <= set(ran)
    assert {"h", "s", "i"} <= set(plan.tensors)
    assert graph.to_bytes(emit(m, plan, fused=True)) == graph.to_bytes(emitted)


@pytest.mark.parametrize(
    "body", ["s = Sigmoid(h) r = LeakyRelu(h) i = Mul(r, s)", "s = Sigmoid(h) r = Mul(h, s) i = Add(r, s)"]
)
def test_other_gates_are_no_silu(body):
    _, _, ran = assert_good(*between(body))
    assert {"QLinearSigmoid", "QLinearMul"} <= set(ran)


@pytest.mark.parametrize("relu", [False, True])
def test_a_concat_of_convolutions_copies_codes(relu):
    more = "p = Relu(p0)" if relu else ""
    text = f"""g (float[2,3,8,8] x, float[6,3,3,3] w, float[6,3,3,3] v, float[4,12,1,1] u) => (float[2,4,6,6] y) {{
        {"p0" if relu else "p"} = Conv(x, w) {more} q = Conv(x, v) c = Concat<axis = 1>(p, q) y = Conv(c, u)
    }}"""
    m = model(text, w=weights(6, 3, 3, 3), v=3 * weights(6, 3, 3, 3, seed=1), u=weights(4, 12, 1, 1))
    plan, _, ran = assert_good(m, {"x": weights(2, 3, 8, 8, seed=5)})
    assert ran.count("QLinearConv") == 3
    assert "QLinearConcat" in ran
    assert (plan.tensors["p"] == plan.tensors["c"]) == (not relu)


def test_constant_operands_are_stored_in_codes():
    m, feeds = between("g0 = Mul(h, k) i = Add(g0, k)")
    plan, emitted = quantized(m, feeds)
    assert list(plan.constants) == ["k"]
    array = CONSTANTS["k"][1]
    scale, zero = Grid(8, False, False).from_range(float(array.min()), float(array.max()))
    codes = stored(emitted, "k_q")
    assert codes.dtype == np.uint8
    np.testing.assert_array_equal(codes, np.clip(np.rint(array / np.float32(scale)) + zero, 0, 255))
    assert stored(emitted, "k_scale") == np.float32(scale)
    assert stored(emitted, "k_zero_point") == zero
    assert "k" not in emitted.graph.initializers
    assert_good(m, feeds)


def test_a_constant_operand_keeps_its_float_value_elsewhere():
    """The same number is the bound of a Clip and the operand of a float node."""
    body = """g0 = Mul(h, three) p = MaxPool<kernel_shape = [1, 1]>(g0) [n] e = Clip(p, minus, three)
              [div] t = Div(e, three) i = Add(e, t)"""
    m, feeds = between(body)
    plan, emitted = quantized(m, feeds)
    assert list(plan.constants) == ["three"]
    clip, div = (graph.node_names(emitted)[name] for name in ("n", "div"))
    assert clip.inputs[2].name == div.inputs[1].name == "three"
    assert_good(m, feeds)


def test_a_float_island_inside_an_integer_region():
    body = "[p] t = Tanh(h) [m] a0 = ReduceMean<axes = [2, 3], keepdims = 1>(t) [n] i = Mul(h, a0)"
    plan, _, ran = assert_good(*between(body))
    assert set(plan.skipped) == {"p", "m"}
    assert {"QLinearMul", "Tanh", "ReduceMean"} <= set(ran)


def test_an_output_on_a_grid_keeps_its_name_and_inner_readers():
    text = """g (float[2,3,8,8] x, float[6,3,3,3] w, float[6,6,1,1] u) => (float[2,6,6,6] h, float[2,6,6,6] y) {
        h = Conv(x, w) t = Tanh(h) y = Conv(h, u)
    }"""
    m = model(text, w=weights(6, 3, 3, 3), u=weights(6, 6, 1, 1))
    feeds = {"x": weights(2, 3, 8, 8, seed=5)}
    _, emitted, ran = assert_good(m, feeds)
    assert ran.count("QLinearConv") == 2
    assert len(np.unique(run(emitted, feeds)["h"])) <= 256


def clip_bounds(emitted, name):
    clip = graph.value_map(emitted)[name].producer()
    return [graph.constant(bound) for bound in clip.inputs[1:3]]


@pytest.mark.parametrize(("low", "high"), [(-0.7, 3.3), (-1.31, 2.2), (-0.203, 0.61)])
def test_the_bounds_of_a_clip_that_rounding_replaces_are_the_ends_of_its_grid(low, high):
    """onnxruntime before 1.31 refuses the graph that it makes where they lie within half a step of these."""
    m, feeds = between("[n] i = Clip(h, minus, three)")
    for name, bound in (("minus", low), ("three", high)):
        graph.set_initializer(m, name, np.asarray(bound, np.float32))
    plan, emitted, ran = assert_good(m, feeds)
    grid = plan.tensors["i"]
    first, last = (np.float32((code - grid.zero_point) * grid.scale) for code in (0, 255))
    narrow, wide = clip_bounds(emitted, "i")
    assert narrow == min(first, np.float32(low))
    assert wide == max(last, np.float32(high))
    assert abs(narrow - low) <= grid.scale / 2
    assert abs(wide - high) <= grid.scale / 2
    assert (narrow, wide) != (np.float32(low), np.float32(high))
    assert "Clip" not in ran


def test_the_bounds_of_a_clip_inside_its_grid_stay():
    """Codes beyond the bounds occur without it."""
    m, feeds = between("[n] i = Clip(h, minus, three)")
    plan, _ = quantized(m, feeds)
    grid = replace(plan.tensors["i"], scale=1.03 * plan.tensors["i"].scale)
    emitted = emit(m, replace(plan, tensors={**plan.tensors, "i": grid}))
    assert clip_bounds(emitted, "i") == [np.float32(-0.7), np.float32(3.3)]
