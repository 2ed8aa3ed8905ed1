import numpy as np
import pytest
from helpers import model, weights
from planning import given, planned

from onnxq import graph
from onnxq.grid import Grid
from onnxq.plan import Precision, Range, make_plan, place

UNSIGNED = Grid(8, signed=False, symmetric=False)
IMAGE = "float[1,3,8,8] x, float[4,3,3,3] w, float[4,4,1,1] u, float[4,8,1,1] v, float z, float six"
CONSTANTS = {
    "w": weights(4, 3, 3, 3),
    "u": weights(4, 4, 1, 1),
    "v": weights(4, 8, 1, 1),
    "z": np.float32(0),
    "six": np.float32(6),
}


def cnn(body, output="float y"):
    return model(f"g ({IMAGE}) => ({output}) {{ {body} }}", **CONSTANTS)


def ends(grid):
    """The floats of the outermost codes."""
    top = 2**grid.bits - 1
    return pytest.approx((-grid.zero_point * grid.scale, (top - grid.zero_point) * grid.scale), abs=grid.scale)


def same(*grids):
    return len({(grid.scale, grid.zero_point, grid.bits) for grid in grids}) == 1


def test_a_range_becomes_a_grid():
    found = given(cnn("h = Conv(x, w) y = Conv(h, u)"), {"x": (-1.0, 3.0), "h": (0.5, 2.0), "y": (-4.0, -1.0)})
    for name, (low, high) in {"x": (-1.0, 3.0), "h": (0.0, 2.0), "y": (-4.0, 0.0)}.items():
        grid = found.tensors[name]
        assert (grid.scale, grid.zero_point) == UNSIGNED.from_range(low, high)
        assert (grid.bits, grid.signed, grid.rule) == (8, False, "given")
    assert {name: grid.everywhere for name, grid in found.tensors.items()} == {"x": False, "h": True, "y": True}


def test_an_absorbed_activation_bounds_the_grid():
    relu = given(cnn("h = Conv(x, w) i = Relu(h) y = Conv(i, u)"), {"x": (-1, 1), "i": (-0.5, 3), "y": (-1, 1)})
    assert relu.tensors["i"].zero_point == 0
    assert ends(relu.tensors["i"]) == (0.0, 3.0)
    clip = given(cnn("h = Conv(x, w) i = Clip(h, z, six) y = Conv(i, u)"), {"x": (-1, 1), "i": (-0.5, 9), "y": (-1, 1)})
    assert (clip.tensors["i"].scale, clip.tensors["i"].zero_point) == UNSIGNED.from_range(0.0, 6.0)
    less = given(cnn("h = Conv(x, w) i = Clip(h, z, six) y = Conv(i, u)"), {"x": (-1, 1), "i": (0, 2), "y": (-1, 1)})
    assert ends(less.tensors["i"]) == (0.0, 2.0)


def test_what_moves_keeps_the_grid_of_where_it_came_from():
    body = """h = Conv(x, w) i = Relu(h) j = MaxPool<kernel_shape = [2, 2]>(i) k = Transpose<perm = [0,1,3,2]>(j)
              y = Conv(k, u)"""
    found = given(cnn(body), {"x": (-1, 1), "i": (0, 4), "j": (0.5, 3), "k": (-9, 9), "y": (-1, 1)}).tensors
    assert same(found["i"], found["j"], found["k"])
    assert ends(found["k"]) == (0.0, 4.0)
    assert not same(found["k"], found["y"])


def test_own_grids_are_not_shared():
    body = "h = Conv(x, w) i = LeakyRelu(h) j = AveragePool<kernel_shape = [2, 2]>(i) y = Conv(j, u)"
    found = given(cnn(body), {"x": (-1, 1), "h": (-4, 4), "i": (-1, 4), "j": (-1, 2), "y": (-1, 1)}).tensors
    assert [ends(found[name]) for name in "hij"] == [(-4, 4), (-1, 4), (-1, 2)]


@pytest.mark.parametrize(
    ("node", "low", "high"),
    [("Sigmoid(h)", 0, 0.9), ("Clip(h, z, six)", 0, 6), ("Relu(h)", 0, 8), ("LeakyRelu(h)", -2, 8)],
)
def test_the_grid_of_an_activation_of_its_own_holds_what_it_returns(node, low, high):
    body = f"g0 = Conv(x, w) h = MaxPool<kernel_shape = [1, 1]>(g0) i = {node} y = Conv(i, u)"
    top = 0.9 if "Sig" in node else 8
    ranges = {"x": (-1, 1), "g0": (-9, 9), "h": (-9, 9), "i": (-2, top), "y": (-1, 1)}
    assert ends(given(cnn(body), ranges).tensors["i"]) == (low, high)


CONCAT = "p = Conv(x, w) {p} q = Conv(x, w) {q} c = Concat<axis = 1>({names}) y = Conv(c, v) {more}"


def test_the_union_of_a_concat_holds_all_operands():
    made = cnn(CONCAT.format(p="", q="", names="p, q", more=""))
    found = given(made, {"x": (-1, 1), "p": (-3, 1), "q": (-1, 5), "c": (-2, 4), "y": (-1, 1)}).tensors
    assert same(found["p"], found["q"], found["c"])
    assert ends(found["c"]) == (-3, 5)
    assert not same(found["c"], found["x"])


def test_a_relu_forbids_a_union_with_negative_values():
    """The runtime absorbs a Relu only when code 0 is 0.0."""
    made = cnn(CONCAT.format(p="r = Relu(p)", q="", names="r, q", more=""))
    ranges = {"x": (-1, 1), "r": (0, 4), "q": (-1, 5), "c": (-1, 5), "y": (-1, 1)}
    found = given(made, ranges).tensors
    assert found["r"].zero_point == 0
    assert ends(found["r"]) == (0, 4)
    assert ends(found["c"]) == (-1, 5)
    assert not same(found["r"], found["c"])
    both = cnn(CONCAT.format(p="r = Relu(p)", q="s = Relu(q)", names="r, s", more=""))
    shared = given(both, {"x": (-1, 1), "r": (0, 4), "s": (0, 5), "c": (0, 5), "y": (-1, 1)}).tensors
    assert same(shared["r"], shared["s"], shared["c"])
    assert shared["c"].zero_point == 0
    assert ends(shared["r"]) == (0, 5)


def test_a_clip_forbids_a_union_beyond_its_bound():
    made = cnn(CONCAT.format(p="r = Clip(p, z, six)", q="s = Relu(q)", names="r, s", more=""))
    ranges = {"x": (-1, 1), "r": (0, 6), "s": (0, 9), "c": (0, 9), "y": (-1, 1)}
    found = given(made, ranges).tensors
    assert ends(found["r"]) == (0, 6)
    assert ends(found["c"]) == (0, 9)
    within = given(made, ranges | {"s": (0, 5), "c": (0, 6)}).tensors
    assert same(within["r"], within["s"], within["c"])


@pytest.mark.parametrize(("width", "shared"), [(4.0, True), (3.0, False)])
def test_a_narrow_operand_that_is_read_elsewhere_keeps_its_grid(width, shared):
    """It would lose more than one bit."""
    made = cnn(CONCAT.format(p="", q="", names="p, q", more="t = Conv(p, u)"))
    ranges = {"x": (-1, 1), "p": (0, width), "q": (-4, 4), "c": (-3.5, 4), "y": (-1, 1), "t": (-1, 1)}
    found = given(made, ranges).tensors
    assert same(found["p"], found["c"]) == shared
    assert same(found["q"], found["c"]) == shared
    if not shared:
        assert ends(found["p"]) == (0, width)


def test_a_chain_of_concats_and_moves_shares_one_grid():
    body = """p = Conv(x, w) q = MaxPool<kernel_shape = [1, 1]>(p) c = Concat<axis = 1>(p, q) d = Relu(c)
              y = Conv(d, v)"""
    ranges = {"x": (-1, 1), "p": (-2, 3), "q": (-1, 3), "c": (-2, 3), "d": (0, 3), "y": (-1, 1)}
    found = given(cnn(body), ranges).tensors
    assert same(found["p"], found["q"], found["c"])
    assert found["d"].zero_point == 0


def test_ranges_remember_their_rules():
    union = Range(-1, 2, "mse").union(Range(0, 3, "minmax"))
    assert (union.low, union.high, union.rule) == (-1, 3, "mse|minmax")
    assert Range(0, 1, "mse").union(Range(0, 2, "mse")).rule == "mse"


BITS = Precision(weight_bits=4, activation_bits=5, first_last=8, residual_bits=6)
DEEP = """[one] h = Conv(x, w) [two] i = Conv(h, u) [add] s = Add(h, i) [three] j = Conv(s, u)
          [add2] k = Add(j, h) [pool] l = MaxPool<kernel_shape = [2, 2]>(k) [four] y = Conv(l, u)"""
DEEP_RANGES = dict.fromkeys(("x", "h", "i", "s", "j", "k", "l", "y"), (-1.0, 1.0))


def test_bits_follow_the_policy():
    found = given(cnn(DEEP), DEEP_RANGES, BITS)
    assert {name: grid.bits for name, grid in found.weights.items()} == {"one": 8, "two": 4, "three": 4, "four": 8}
    assert {name: grid.bits for name, grid in found.tensors.items()} == {
        "x": 8,  # read by the first layer
        "h": 5,  # by a layer and by sums
        "i": 6,  # by a sum only
        "s": 5,
        "j": 6,
        "k": 8,  # shares its grid with what the last layer reads
        "l": 8,
        "y": 6,
    }


def test_the_first_and_last_layer_can_be_narrow_too():
    found = given(cnn(DEEP), DEEP_RANGES, Precision(weight_bits=4, activation_bits=4, first_last=3))
    assert [found.weights[name].bits for name in ("one", "two", "four")] == [3, 4, 3]
    assert [found.tensors[name].bits for name in ("x", "h", "l", "i")] == [3, 4, 3, 8]


def test_where_readers_disagree_the_larger_number_of_bits_holds():
    body = "[one] h = Conv(x, w) [two] i = Conv(h, u) [three] j = Conv(h, u) s = Add(i, j) [four] y = Conv(h, u)"
    made = cnn(body)
    found = given(made, dict.fromkeys(place(made).tensors, (-1, 1)), Precision(activation_bits=4))
    assert found.tensors["h"].bits == 8  # the last layer reads it as well
    early = cnn("[one] h = Conv(x, w) [two] i = Conv(x, w) s = Add(h, i) [three] y = Conv(s, u)")
    found = given(early, dict.fromkeys(place(early).tensors, (-1, 1)), Precision(activation_bits=4))
    assert found.tensors["x"].bits == 8  # the first layer read it, too


def test_narrow_layers_get_7_bits():
    found = given(cnn(DEEP), DEEP_RANGES, Precision(narrow=frozenset({"two", "four"})))
    assert [found.weights[name].bits for name in ("one", "two", "three", "four")] == [8, 7, 8, 7]
    low = given(cnn(DEEP), DEEP_RANGES, Precision(weight_bits=4, narrow=frozenset({"two"})))
    assert low.weights["two"].bits == 4


def test_a_single_step_per_weight():
    found = given(cnn(DEEP), DEEP_RANGES, Precision(per_channel=False))
    assert found.weights["one"].axis is None
    assert found.weights["one"].scales == pytest.approx([np.abs(CONSTANTS["w"]).max() / 127])
    assert given(cnn(DEEP), DEEP_RANGES).weights["one"].axis == 0
    assert len(given(cnn(DEEP), DEEP_RANGES).weights["one"].scales) == 4


@pytest.mark.parametrize(("op", "axis"), [("Gemm<transB = 1>", 0), ("Gemm", 1), ("MatMul", 1)])
def test_weight_steps_lie_along_the_output_channels(op, axis):
    w = weights(4, 4) * np.asarray([1, 10, 100, 1000], np.float32).reshape((4, 1) if axis == 0 else (1, 4))
    made = model(f"g (float[2,4] x, float[4,4] w) => (float[2,4] y) {{ [n] y = {op}(x, w) }}", w=w)
    found = given(made, {"x": (-1, 1)}).weights["n"]
    assert found.axis == axis
    assert found.scales == pytest.approx(np.abs(w).max(axis=1 - axis) / 127)


def test_constant_operands_get_grids_of_their_own():
    text = "g (float[1,4,4,4] x, float[4,4,1,1] u, float[4,1,1] k) => (float y)"
    k = np.asarray([-1, 0.5, 2, 3], np.float32).reshape(4, 1, 1)
    made = model(f"{text} {{ h = Conv(x, u) i = Mul(h, k) y = Conv(i, u) }}", u=CONSTANTS["u"], k=k)
    found = planned(made, {"x": weights(1, 4, 4, 4)}).constants
    assert list(found) == ["k"]
    assert (found["k"].scale, found["k"].zero_point) == UNSIGNED.from_range(-1.0, 3.0)


def test_a_plan_says_what_it_is_for():
    made = cnn("[a] h = Conv(x, w) [t] i = Tanh(h) [b] y = Conv(i, u)")
    found = given(made, {"x": (-1, 1), "h": (-1, 1), "i": (-1, 1), "y": (-1, 1)})
    assert found.target == "cpu"
    assert found.source == graph.digest(made)
    assert found.integer == ("a", "b")
    assert found.skipped == {"t": "the runtime has no integer kernel for Tanh"}


SPLIT = """g (float[1,3,8,8] x, float[4,3,3,3] w, int64[2] n, float[4,2,1,1] u) => (float y, float z) {
    h = Conv(x, w) i, j = Split<axis = 1>(h, n) y = Conv(i, u) z = Conv(j, u)
}"""


@pytest.mark.parametrize(
    ("judged", "expected"), [({"i", "j"}, (-5, 7)), ({"i"}, (-9, 9)), (set(), (-9, 9)), ({"h", "i", "j"}, (-9, 9))]
)
def test_ranges_judged_behind_a_split_are_taken_together(judged, expected):
    made = model(SPLIT, w=CONSTANTS["w"], n=np.asarray([2, 2]), u=weights(4, 2, 1, 1))
    placement = place(made)
    ends_of = {"x": (-1, 1), "h": (-9, 9), "i": (-1, 7), "j": (-5, 2), "y": (-1, 1), "z": (-1, 1)}
    ranges = {name: Range(*ends_of[name], "given", name in judged) for name in placement.tensors}
    found = make_plan(made, placement, ranges).tensors
    assert same(found["h"], found["i"], found["j"])
    assert ends(found["h"]) == expected


@pytest.mark.parametrize(("skip", "expected"), [("", (-1, 2)), ("k = LeakyRelu(h) o = Conv(k, u)", (-9, 9))])
def test_a_range_judged_behind_moves_does_not_clip_what_others_read(skip, expected):
    body = (
        """h = Conv(x, w) i = MaxPool<kernel_shape = [2, 2]>(h) j = Transpose<perm = [0, 1, 3, 2]>(i) y = Conv(j, u)"""
    )
    made = cnn(f"{body} {skip}", "float y, float o" if skip else "float y")
    ends_of = dict.fromkeys(("x", "y", "o", "k"), (-3, 3)) | {"h": (-9, 9), "i": (-8, 9), "j": (-1, 2)}
    placement = place(made)
    ranges = {name: Range(*ends_of[name], "given", name == "j") for name in placement.tensors}
    found = make_plan(made, placement, ranges).tensors
    assert same(found["h"], found["i"], found["j"])
    assert ends(found["j"]) == expected


@pytest.mark.parametrize(("skip", "expected"), [("", (-2, 3)), ("o = Conv(p, u)", (-9, 8))])
def test_a_range_judged_behind_a_concat_does_not_clip_what_others_read(skip, expected):
    body = (
        "p = Conv(x, w) m = MaxPool<kernel_shape = [1, 1]>(p) q = Conv(x, w) c = Concat<axis = 1>(m, q) y = Conv(c, v)"
    )
    made = cnn(f"{body} {skip}", "float y, float o" if skip else "float y")
    ends_of = dict.fromkeys(("x", "y", "o"), (-3, 3)) | {"p": (-9, 4), "m": (-9, 4), "q": (-5, 8), "c": (-2, 3)}
    placement = place(made)
    ranges = {name: Range(*ends_of[name], "given", name == "c") for name in placement.tensors}
    found = make_plan(made, placement, ranges).tensors
    assert same(found["p"], found["q"], found["c"])
    assert ends(found["c"]) == expected
