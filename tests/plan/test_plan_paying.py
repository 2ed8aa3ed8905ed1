"""The labelling of a graph with float and integer that takes the least time."""

import itertools

import pytest
from helpers import model, weights
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.plan import paying, place
from onnxq.plan.paying import OUTSIDE, Crossing, Prices, cheapest, crossings, total, unpaid

TIMES = st.integers(0, 12).map(float)
STEPS = st.integers(0, 5).map(float)


@st.composite
def problems(draw):
    """Up to 7 nodes, each reading some tensors made before it; some without an integer kernel."""
    names = [f"n{index}" for index in range(draw(st.integers(1, 7)))]
    slow = {name: draw(TIMES) for name in names}
    quick = {name: draw(TIMES) for name in names if draw(st.integers(0, 4))}
    tensors = [Crossing(OUTSIDE, (names[0],), draw(STEPS), draw(STEPS))]
    for index, name in enumerate(names):
        behind = names[index + 1 :]
        readers = draw(st.lists(st.sampled_from(behind), unique=True)) if behind else []
        readers += [OUTSIDE] if not readers or draw(st.booleans()) else []
        tensors.append(Crossing(name, tuple(readers), draw(STEPS), draw(STEPS)))
    return slow, quick, tensors


def every_labelling(quick):
    for count in range(len(quick) + 1):
        yield from (set(chosen) for chosen in itertools.combinations(quick, count))


@settings(max_examples=40, deadline=None)
@given(problems())
def test_no_labelling_takes_less_time_and_none_of_equal_time_has_more_integers(problem):
    slow, quick, tensors = problem
    found = cheapest(slow, quick, tensors)
    assert found <= set(quick)
    time = total(slow, quick, tensors, found)
    for other in every_labelling(quick):
        rival = total(slow, quick, tensors, other)
        assert time <= rival
        assert rival > time or other <= found


@pytest.mark.parametrize("starts", [("a", "b"), ("b", "a")])
@pytest.mark.parametrize("ends", [("c", "d"), ("d", "c")])
def test_flow_that_took_a_wrong_turn_is_led_back(starts, ends):
    network = paying._Network()
    for start in starts:
        network.arc(paying._SOURCE, start, 1)
    for end in ends:
        network.arc("a", end, 1)
        network.arc(end, paying._SINK, 1)
    network.arc("b", "c", 1)
    network.arc("b", "b", 7)
    network.fill()
    assert network.behind() == {paying._SINK}


def test_a_total_counts_nodes_and_each_crossing_tensor_once():
    slow, quick = {"a": 1.0, "b": 2.0, "c": 4.0}, {"a": 0.1, "b": 0.2, "c": 0.4}
    tensors = [Crossing(OUTSIDE, ("a",), 10.0, 20.0), Crossing("a", ("b", "c"), 40.0, 80.0)]
    tensors += [Crossing("b", ("c", OUTSIDE), 160.0, 320.0), Crossing("c", (OUTSIDE,), 640.0, 1280.0)]
    assert total(slow, quick, tensors, set()) == 7.0
    assert total(slow, quick, tensors, {"a"}) == pytest.approx(6.1 + 10.0 + 80.0)
    assert total(slow, quick, tensors, {"b", "c"}) == pytest.approx(1.6 + 40.0 + 320.0 + 1280.0)
    assert total(slow, quick, tensors, {"a", "b", "c"}) == pytest.approx(0.7 + 10.0 + 320.0 + 1280.0)


TEXT = """g (float[n,3,24,24] x, float[8,3,3,3] w1, float[16,8,3,3] w2, float[16,16,3,3] w3, float[16,10] w4)
=> (float[n,10] y) {
    [stem] a = Conv(x, w1) r = Relu(a) [mid] b = Conv(r, w2) s = Relu(b) [last] c = Conv(s, w3) t = Relu(c)
    [pool] p = GlobalAveragePool(t) [flat] f = Flatten(p) [head] y = Gemm(f, w4)
}"""


def placed():
    sizes = {"w1": (8, 3, 3, 3), "w2": (16, 8, 3, 3), "w3": (16, 16, 3, 3), "w4": (16, 10)}
    return place(model(TEXT, **{name: weights(*shape) for name, shape in sizes.items()}))


def prices(quick, enter=0.1, leave=0.1):
    tensors = ("x", "r", "s", "t", "p", "f", "y")
    slow = {"stem": 2.0, "mid": 2.0, "last": 2.0, "pool": 0.2, "flat": 0.1, "head": 0.2}
    return Prices(slow, slow | quick, dict.fromkeys(tensors, enter), dict.fromkeys(tensors, leave))


def test_a_slow_stem_goes_back_to_float_and_the_rest_stays():
    found = placed()
    quick = {"stem": 4.0, "mid": 1.0, "last": 1.0}
    assert unpaid(found, prices(quick)) == {"stem"}
    assert unpaid(found, prices(quick | {"mid": 3.0})) == {"stem", "mid"}


def test_a_slow_layer_stays_where_the_steps_around_it_cost_more():
    found = placed()
    quick = {"stem": 1.0, "mid": 2.5, "last": 1.0}
    assert unpaid(found, prices(quick)) == {"mid"}
    assert unpaid(found, prices(quick, leave=0.3, enter=0.3)) == set()
    assert unpaid(found, prices(quick, leave=0.0, enter=0.49)) == {"mid"}
    assert unpaid(found, prices(quick, leave=0.49, enter=0.0)) == {"mid"}


def test_a_gemm_returns_float_at_no_cost_and_a_convolution_does_not():
    found = {tensor.maker: tensor for tensor in crossings(placed(), prices({}))}
    assert found["head"] == Crossing("head", (OUTSIDE,), 0.1, 0.0)
    assert found["stem"] == Crossing("stem", ("mid",), 0.1, 0.1)
    assert found["flat"] == Crossing("flat", ("head",), 0.1, 0.1)
    assert found[OUTSIDE] == Crossing(OUTSIDE, ("stem",), 0.1, 0.1)


def test_what_has_no_integer_kernel_is_never_chosen():
    slow, quick = {"a": 5.0, "b": 5.0}, {"b": 1.0}
    tensors = [Crossing("a", ("b",), 1.0, 1.0), Crossing("b", (OUTSIDE,), 1.0, 2.0)]
    assert cheapest(slow, quick, tensors) == {"b"}
    assert cheapest(slow, quick, [tensors[0], Crossing("b", (OUTSIDE,), 1.0, 4.0)]) == set()
