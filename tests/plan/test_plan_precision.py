"""Bits of single layers in a plan."""

import numpy as np
from helpers import model, weights
from planning import ranges_of

from onnxq.plan import Groups, Precision, Range, activation_bits, make_plan, place
from onnxq.plan.grids import tied_layers, with_precision

TEXT = """g (float[n,3,8,8] x, float[4,3,3,3] w, float[4,4,1,1] u, float[5,4,1,1] v, float[4,9,1,1] t)
=> (float[n,4,6,6] y) {
    [a] h = Conv(x, w) i = Relu(h) [b] j = Conv(i, u) [c] k = Conv(i, v) o = Concat<axis = 1>(j, k) [d] y = Conv(o, t)
}"""
SIZES = {"w": (4, 3, 3, 3), "u": (4, 4, 1, 1), "v": (5, 4, 1, 1), "t": (4, 9, 1, 1)}


def made():
    net = model(TEXT, **{name: weights(*shape) for name, shape in SIZES.items()})
    placement = place(net)
    return net, placement, ranges_of(net, {"x": weights(2, 3, 8, 8)}, placement.tensors)


def bits_of(plan):
    return {name: grid.bits for name, grid in plan.weights.items()}


def test_layers_of_their_own_bits_override_the_uniform_ones_and_the_ends():
    net, placement, ranges = made()
    precision = Precision(weight_bits=5, activation_bits=6, first_last=7, layers={"a": (4, 3), "c": (2, 8)})
    plan = make_plan(net, placement, ranges, precision)
    assert bits_of(plan) == {"a": 4, "b": 5, "c": 2, "d": 7}
    assert {name: plan.tensors[name].bits for name in "xio"} == {"x": 3, "i": 8, "o": 7}


def test_the_larger_number_of_activation_bits_holds_where_readers_disagree():
    net, placement, ranges = made()
    for b, c in ((4, 6), (6, 4)):
        plan = make_plan(net, placement, ranges, Precision(layers={"b": (8, b), "c": (8, c)}))
        assert plan.tensors["i"].bits == 6


def test_narrow_layers_keep_seven_bits():
    net, placement, ranges = made()
    precision = Precision(narrow=frozenset(["b", "c"]), layers={"b": (8, 8), "c": (4, 8)})
    assert bits_of(make_plan(net, placement, ranges, precision)) == {"a": 8, "b": 7, "c": 4, "d": 8}


def test_a_plan_with_other_bits_is_the_one_made_anew():
    net, placement, ranges = made()
    other = {name: Range(found.low / 2, found.high / 3, "other") for name, found in ranges.items()}
    plan = make_plan(net, placement, ranges)
    for precision in (
        Precision(),
        Precision(layers={"b": (3, 4), "c": (8, 4)}),
        Precision(weight_bits=4, first_last=5),
    ):
        for chosen in (ranges, other):
            assert with_precision(plan, placement, chosen, precision) == make_plan(net, placement, chosen, precision)
    same = with_precision(plan, placement, ranges, Precision(layers={"b": (3, 8)}))
    assert same.weights["d"] is plan.weights["d"]


def test_weights_follow_the_step_of_their_input():
    """A bias needs steps that leave it room in 32 bits, and the room depends on the input's step."""
    text = """g (float[n,8] x, float[8,4] w, float[4] b, float[4,3] v) => (float[n,3] y) {
        [a] h = Gemm(x, w, b) [c] y = MatMul(h, v)
    }"""
    net = model(text, w=weights(8, 4), b=np.full(4, 1e7, np.float32), v=weights(4, 3))
    placement = place(net)
    ranges = {name: Range(-1e-3, 1e-3, "given") for name in placement.tensors}
    wide = {name: Range(-1e3, 1e3, "given") for name in placement.tensors}
    plan = make_plan(net, placement, ranges)
    assert with_precision(plan, placement, wide, Precision()) == make_plan(net, placement, wide) != plan


def test_layers_of_the_same_input_are_tied():
    _, placement, ranges = made()
    assert tied_layers(placement, Groups(placement, ranges)) == (("a",), ("b", "c"), ("d",))
    bits = activation_bits(placement, Groups(placement, ranges), Precision(layers={"d": (8, 5)}))
    assert (bits["o"], bits["x"]) == (5, 8)
