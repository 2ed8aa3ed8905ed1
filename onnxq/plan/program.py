"""Mixed precision as an integer program: one choice of bits per group of layers, the least degradation that fits.

    minimise    sum over g, p of  d[g, p] I[g, p]
    subject to  sum over p of I[g, p] = 1                                             for every group g
                sum over g, p of c[g, p] I[g, p] + sum over e of b[e] z[e] <= limit   for every budget
                z[e] >= |f[left of e] - f[right of e]|                                for every pair of neighbours e

with I binary, f[g] = I[g, float], and b[e] the cost of the step between integers and float. As b is never negative,
z is 1 where neighbours differ and may be 0 elsewhere, without having to be binary itself. Degradations below
`FLOOR` count as `FLOOR`: measured ones scatter around 0, and what is negative by chance would be worth paying for.

I. Hubara et al., "Improving Post Training Neural Quantization: Layer-wise Calibration and Integer Programming", arXiv
2006.10518, equation 5; solved by HiGHS (`scipy.optimize.milp`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxq.errors import TargetNotMet
from onnxq.plan.problem import FLOOR, SAME, Degradations, Problem
from onnxq.types.mixed import Allocation, Bits, Budget, Costs

_APART = 1e-6
"""Relative difference of costs below which a front does not tell points apart: the solver's own tolerance."""


class Infeasible(TargetNotMet):
    """No choice of bits meets the budgets.

    Attributes:
        name: The costs whose limit cannot be met.
        nearest: The least that they can add up to while the other budgets hold; None where these alone are too much.
    """

    def __init__(self, message: str, name: str, nearest: float | None) -> None:
        super().__init__(message)
        self.name, self.nearest = name, nearest


def solve(degradation: Degradations, budgets: Sequence[Budget] = ()) -> Allocation:
    """The choice of bits with the least degradation within all budgets; the cheaper one where two degrade alike.

    Args:
        degradation: Error added by every group at each number of bits it may get.
        budgets: Limits; their costs have the same groups and at least the same bits.

    Raises:
        Infeasible: No choice meets the budgets; says what the nearest limit is.
        UsageError: Costs lack a group, or bits of it.
    """
    problem = Problem(degradation, [budget.costs for budget in budgets])
    limits = [budget.limit for budget in budgets]
    found = problem.least(problem.degradation, limits)
    if found is None:
        raise _nearest(problem, budgets)
    return _described(problem.bits(found), degradation, problem.tables)


def cheapest(
    degradation: Degradations, costs: Costs, limit: float = np.inf, budgets: Sequence[Budget] = ()
) -> Allocation:
    """The choice of bits with the least `costs` whose degradation is `limit` at most.

    Args:
        degradation: As for `solve`.
        costs: What to save.
        limit: Most total degradation.
        budgets: Limits of other costs.

    Raises:
        Infeasible: No choice meets the limit and the budgets.
        UsageError: Costs lack a group, or bits of it.
    """
    added = Costs("predicted degradation", "", {name: _floored(errors) for name, errors in degradation.items()})
    kept = [*budgets, Budget(added, limit)]
    problem = Problem(degradation, [costs, *(budget.costs for budget in kept)])
    found = problem.least(problem.costs[0], [np.inf, *(budget.limit for budget in kept)])
    if found is None:
        raise _nearest(Problem(degradation, [budget.costs for budget in kept]), kept)
    bits = problem.bits(found)
    return _described(bits, degradation, [costs, *(budget.costs for budget in budgets)])


def front(
    degradation: Degradations, costs: Costs, budgets: Sequence[Budget] = (), *, points: int | None = 16
) -> tuple[Allocation, ...]:
    """The Pareto front of cost against degradation, from the most costly point to the cheapest.

    Args:
        degradation: As for `solve`.
        costs: What is traded against degradation.
        budgets: Limits that every point keeps.
        points: About how many; the limits in between are evenly spaced. None gives every point there is, which can
            be many.

    Raises:
        Infeasible: Not even one point keeps the budgets.
    """
    problem = Problem(degradation, [costs, *(budget.costs for budget in budgets)])
    limits = [budget.limit for budget in budgets]
    cheap = problem.least(problem.costs[0], [np.inf, *limits])
    if cheap is None:
        raise _nearest(Problem(degradation, [budget.costs for budget in budgets]), budgets)
    least = problem.cost(0, cheap)
    found: list[Allocation] = []
    limit = np.inf
    step = 0.0
    while (chosen := problem.least(problem.degradation, [limit, *limits])) is not None:
        reached = problem.cost(0, chosen)
        found.append(_described(problem.bits(chosen), degradation, problem.tables))
        step = step or max((reached - least) / max((points or 2) - 1, 1), SAME * abs(reached))
        if reached - least <= SAME * abs(reached):
            break
        limit = max(reached - step, least) if points is not None else reached - _APART * abs(reached)
    return tuple(found)


def greedy(degradation: Degradations, budget: Budget) -> Allocation:
    """What a simpler method finds, for comparison: from the least degradation, the step that costs least per saving.

    Steps between integers and float are not looked ahead at.

    Raises:
        Infeasible: The budget is not met where no group can be made cheaper.
    """
    errors = {name: _floored(options) for name, options in degradation.items()}
    bits = {name: min(options, key=lambda key: options[key]) for name, options in errors.items()}
    cost = budget.costs.total(bits)
    while cost > budget.limit:
        steps = [
            ((options[chosen] - options[bits[name]]) / saved, name, chosen)
            for name, options in errors.items()
            for chosen in options
            if (saved := budget.costs.layers[name][bits[name]] - budget.costs.layers[name][chosen]) > 0
        ]
        if not steps:
            least = f"the smallest {budget.costs.name} found is {cost:g} {budget.costs.unit}"
            raise Infeasible(f"{least}, above the {budget.limit:g} allowed.", budget.costs.name, cost)
        _, name, chosen = min(steps)
        bits[name] = chosen
        cost = budget.costs.total(bits)
    return _described(bits, degradation, [budget.costs])


def _floored(errors: Mapping[Bits, float]) -> dict[Bits, float]:
    return {bits: max(error, FLOOR) for bits, error in errors.items()}


def _described(bits: Mapping[str, Bits], degradation: Degradations, costs: Sequence[Costs]) -> Allocation:
    total = sum(max(degradation[name][chosen], FLOOR) for name, chosen in bits.items())
    return Allocation(bits, total, {entry.name: entry.total(bits) for entry in costs})


def _nearest(problem: Problem, budgets: Sequence[Budget]) -> Infeasible:
    """The error that says which limit would do: of one budget if the others hold, or of each on its own."""
    limits = [budget.limit for budget in budgets]
    for alone in (False, True):
        for index, budget in enumerate(budgets):
            others = [limit if index != other and not alone else np.inf for other, limit in enumerate(limits)]
            found = problem.least(problem.costs[index], others)
            if found is None:
                continue
            reached, name, unit = problem.cost(index, found), budget.costs.name, budget.costs.unit
            if reached > budget.limit:
                rest = "" if alone or len(budgets) == 1 else " with the other budgets kept"
                text = f"the {name} cannot be {budget.limit:g} {unit}: the least that can be reached{rest} is"
                return Infeasible(f"{text.strip()} {reached:g} {unit}".rstrip() + ".", name, reached)
    names = ", ".join(budget.costs.name for budget in budgets)
    return Infeasible(f"the budgets ({names}) cannot be met together.", names, None)
