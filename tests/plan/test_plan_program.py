"""The integer program against trying everything."""

import itertools
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxq.errors import TargetNotMet, UsageError
from onnxq.plan import problem, program
from onnxq.plan.problem import FLOOR
from onnxq.types.mixed import FLOAT, Budget, Costs, bits_text

OPTIONS = ((8, 8), (4, 8), FLOAT)


def figures(seed, groups, *, boundary=False):
    """Random degradations, sizes and latencies of `groups` groups with three options each."""
    rng = np.random.default_rng(seed)
    names = [f"layer_{index}" for index in range(groups)]
    errors = {name: {bits: float(rng.choice([-1, 1, 1]) * rng.lognormal(-4, 2)) for bits in OPTIONS} for name in names}
    size = {name: {bits: float(rng.integers(1, 2000)) for bits in OPTIONS} for name in names}
    time = {name: {bits: float(rng.lognormal(0, 1)) for bits in OPTIONS} for name in names}
    edges = {}
    if boundary:
        edges = {pair: float(rng.lognormal(0, 1)) for pair in itertools.pairwise(names)}
    return errors, Costs("size", "bytes", size, 100.0), Costs("latency", "ms", time, 0.5, edges)


def everything(errors):
    """(bits, degradation) of every choice there is."""
    for chosen in itertools.product(OPTIONS, repeat=len(errors)):
        bits = dict(zip(errors, chosen, strict=True))
        yield bits, sum(max(errors[name][key], FLOOR) for name, key in bits.items())


def between(costs, errors, share):
    totals = [costs.total(bits) for bits, _ in everything(errors)]
    return min(totals) + share * (max(totals) - min(totals))


CASES = {
    "seed": st.integers(0, 10_000),
    "groups": st.integers(1, 5),
    "boundary": st.booleans(),
    "shares": st.tuples(st.floats(0.0, 1.0), st.floats(0.0, 1.0)),
}


@settings(max_examples=40, deadline=None)
@given(**CASES)
def test_the_least_degradation_within_two_budgets(seed, groups, boundary, shares):
    errors, size, time = figures(seed, groups, boundary=boundary)
    limits = [between(costs, errors, share) for costs, share in zip((size, time), shares, strict=True)]
    fits = [
        degradation
        for bits, degradation in everything(errors)
        if size.total(bits) <= limits[0] * (1 + 1e-9) and time.total(bits) <= limits[1] * (1 + 1e-9)
    ]
    budgets = [Budget(size, limits[0]), Budget(time, limits[1])]
    if not fits:
        with pytest.raises(program.Infeasible):
            program.solve(errors, budgets)
        return
    found = program.solve(errors, budgets)
    assert found.degradation == pytest.approx(min(fits), rel=1e-7)
    assert set(found.bits) == set(errors)
    for budget in budgets:
        assert found.costs[budget.costs.name] == budget.costs.total(found.bits) <= budget.limit * (1 + 1e-8)


@settings(max_examples=25, deadline=None)
@given(**CASES)
def test_the_least_cost_within_a_degradation(seed, groups, boundary, shares):
    errors, _, time = figures(seed, groups, boundary=boundary)
    degradations = sorted(degradation for _, degradation in everything(errors))
    limit = degradations[int(shares[0] * (len(degradations) - 1))]
    wanted = min(time.total(bits) for bits, degradation in everything(errors) if degradation <= limit * (1 + 1e-9))
    found = program.cheapest(errors, time, limit)
    assert found.costs == {"latency": pytest.approx(wanted, rel=1e-7)}
    assert found.degradation <= limit * (1 + 1e-8)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), groups=st.integers(1, 4), boundary=st.booleans())
def test_the_whole_front_is_every_point_that_nothing_beats(seed, groups, boundary):
    errors, _, time = figures(seed, groups, boundary=boundary)
    points = sorted((time.total(bits), degradation) for bits, degradation in everything(errors))
    wanted, least = [], np.inf
    for cost, degradation in points:
        if degradation < least * (1 - 1e-9):
            wanted.append((cost, degradation))
            least = degradation
    found = [(point.costs["latency"], point.degradation) for point in program.front(errors, time, points=None)]
    np.testing.assert_allclose(found, wanted[::-1], rtol=1e-7)


def test_a_front_of_few_points_goes_from_one_end_to_the_other():
    errors, size, _ = figures(3, 5)
    found = program.front(errors, size, points=4)
    costs = [point.costs["size"] for point in found]
    degradations = [point.degradation for point in found]
    assert 3 <= len(found) <= 6
    assert costs == sorted(costs, reverse=True)
    assert degradations == sorted(degradations)
    assert costs[-1] == min(size.total(bits) for bits, _ in everything(errors))
    assert degradations[0] == pytest.approx(min(degradation for _, degradation in everything(errors)))
    gaps = -np.diff(costs)
    assert gaps[:-1].min() >= (costs[0] - costs[-1]) / 3 - 1e-6


def test_a_front_keeps_other_budgets():
    errors, size, time = figures(5, 4)
    limit = between(time, errors, 0.3)
    for point in program.front(errors, size, [Budget(time, limit)], points=5):
        assert time.total(point.bits) <= limit


def test_an_isolated_layer_in_float_pays_for_both_steps():
    errors = {name: {(8, 8): 0.1, FLOAT: 0.0} for name in "abc"}
    errors["b"][(8, 8)] = 5.0
    prices = {name: {(8, 8): 1.0, FLOAT: 2.0} for name in "abc"}
    costs = Costs("latency", "ms", prices, 0.0, {("a", "b"): 10.0, ("b", "c"): 3.0})
    assert costs.total({"a": (8, 8), "b": FLOAT, "c": (8, 8)}) == 1 + 2 + 1 + 10 + 3
    kept = program.solve(errors, [Budget(costs, 16.9)]).bits
    assert kept == {"a": FLOAT, "b": FLOAT, "c": FLOAT}
    assert program.solve(errors, [Budget(costs, 5.9)]).bits["b"] == (8, 8)
    alone = program.solve(errors | {"a": {(8, 8): 0.1}}, [Budget(costs, 17.0)])
    assert alone.bits == {"a": (8, 8), "b": FLOAT, "c": FLOAT}


def test_of_equal_choices_the_cheaper_one_is_taken():
    errors = {"a": {(8, 8): 0.0, (4, 8): -1.0, FLOAT: 1e-9}}
    costs = Costs("size", "bytes", {"a": {(8, 8): 2.0, (4, 8): 1.0, FLOAT: 8.0}})
    assert program.solve(errors, [Budget(costs, 100.0)]).bits == {"a": (4, 8)}


def test_a_budget_that_cannot_be_met_is_refused_with_the_nearest_limit():
    errors, size, time = figures(1, 4)
    least = min(size.total(bits) for bits, _ in everything(errors))
    with pytest.raises(program.Infeasible, match=f"size cannot be 50 bytes: .* {least:g} bytes") as caught:
        program.solve(errors, [Budget(size, 50.0)])
    assert (caught.value.name, caught.value.nearest) == ("size", least)
    assert isinstance(caught.value, TargetNotMet)
    assert program.solve(errors, [Budget(size, least)]).costs["size"] == least
    quickest = min(time.total(bits) for bits, _ in everything(errors))
    beside = min(size.total(bits) for bits, _ in everything(errors) if time.total(bits) <= quickest + 1e-6)
    with pytest.raises(program.Infeasible, match="with the other budgets kept") as caught:
        program.solve(errors, [Budget(size, beside - 1), Budget(time, quickest)])
    assert (caught.value.name, caught.value.nearest) == ("size", beside)


def test_budgets_that_exclude_each_other_name_what_each_can_do_alone():
    errors, size, time = figures(1, 3)
    with pytest.raises(program.Infeasible) as caught:
        program.solve(errors, [Budget(size, 1.0), Budget(time, 0.01)])
    assert caught.value.nearest == min(size.total(bits) for bits, _ in everything(errors))


def test_a_degradation_that_cannot_be_met_is_refused():
    errors, size, _ = figures(2, 3)
    with pytest.raises(program.Infeasible, match="predicted degradation cannot be 1e-09"):
        program.cheapest(errors, size, 1e-9)


def test_costs_must_know_every_choice():
    errors, size, _ = figures(2, 2)
    del size.layers["layer_1"][(4, 8)]
    with pytest.raises(UsageError, match="size of 'layer_1' at w4a8"):
        program.solve(errors, [Budget(size, 1e9)])


def test_greedy_meets_the_budget_and_is_never_better():
    for seed in range(20):
        errors, size, _ = figures(seed, 5)
        budget = Budget(size, between(size, errors, 0.4))
        found = program.greedy(errors, budget)
        assert found.costs["size"] <= budget.limit
        assert found.degradation >= program.solve(errors, [budget]).degradation - 1e-12
    with pytest.raises(program.Infeasible):
        program.greedy(errors, Budget(size, 1.0))


def test_the_solver_leaves_standard_output_alone(capfd, monkeypatch):
    solver = problem.milp

    def noisy(*arguments, **options):
        os.write(1, b"a remark of the solver")
        return solver(*arguments, **options)

    monkeypatch.setattr(problem, "milp", noisy)
    errors, size, _ = figures(0, 3)
    program.solve(errors, [Budget(size, 1e6)])
    os.write(1, b"still here")
    assert capfd.readouterr().out == "still here"


def test_the_constant_counts():
    """So much that no solution that forgets it can be right by luck."""
    rng = np.random.default_rng(4)
    errors = {f"l{index}": {(8, 8): 0.0, (4, 8): float(rng.lognormal(-4, 1))} for index in range(30)}
    sizes = {name: {(8, 8): 8.0, (4, 8): 4.0} for name in errors}
    found = program.solve(errors, [Budget(Costs("size", "bytes", sizes, 1e4), 1e4 + 30 * 8 - 15 * 4)])
    cheap = sorted(options[(4, 8)] for options in errors.values())[:15]
    assert found.degradation == pytest.approx(sum(cheap) + 15 * FLOOR)


def test_costs_of_groups_are_the_sums_over_their_layers():
    layers = {"a": {(8, 8): 1.0, FLOAT: 5.0}, "b": {(8, 8): 2.0, (4, 8): 1.0, FLOAT: 6.0}, "c": {(8, 8): 4.0}}
    costs = Costs("size", "bytes", layers, 7.0, {("a", "b"): 1.0, ("b", "c"): 2.0, ("a", "c"): 3.0})
    grouped = costs.grouped({"a": ("a", "b"), "c": ("c",)})
    assert grouped.layers == {"a": {(8, 8): 3.0, FLOAT: 11.0}, "c": {(8, 8): 4.0}}
    assert grouped.boundary == {("a", "c"): 5.0}
    assert grouped.total({"a": FLOAT, "c": (8, 8)}) == 7 + 11 + 4 + 5


def test_bits_are_written_as_people_do():
    assert [bits_text(bits) for bits in ((4, 8), FLOAT)] == ["w4a8", "float"]
