"""The integer program of `onnxq.plan.program`, as HiGHS takes it (`scipy.optimize.milp`).

Choices that another one of the same group beats in every respect are left out before, which also settles what is
taken of two equally good ones. All rows are scaled, as the solver's tolerances are absolute.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from onnxq.errors import UsageError
from onnxq.types.mixed import FLOAT, Bits, Costs, bits_text

FLOOR = 1e-6
"""The least degradation that counts."""
SAME = 1e-9
"""Relative difference of sums of floats that counts as none."""
Degradations = Mapping[str, Mapping[Bits, float]]
"""Group -> bits -> the error they add."""
Floats = npt.NDArray[np.float64]

_RANGE = 1e4
"""What the largest coefficient of a row is scaled to."""
_TRIES = 64
"""Most solutions that may turn out to exceed a limit by a rounding error."""


@contextmanager
def _silent() -> Iterator[None]:
    """HiGHS writes remarks to the process's standard output whatever it is told; that is where results go."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@dataclass(frozen=True)
class Row:
    """Coefficients of all variables, and what is added to their sum."""

    values: Floats
    constant: float = 0.0


class Problem:
    """The variables: one binary per group and bits, then one per pair of neighbours.

    Args:
        degradation: Error added by every group at each number of bits it may get.
        costs: Whatever may be limited or minimised.

    Raises:
        UsageError: Costs lack a group, or bits of it.
    """

    def __init__(self, degradation: Degradations, costs: Sequence[Costs]) -> None:
        self.errors = degradation
        self.tables = costs
        self.choices = _useful(degradation, costs)
        self.pairs = list(dict.fromkeys(pair for entry in costs for pair in entry.boundary))
        self._column = {choice: index for index, choice in enumerate(self.choices)}
        size = len(self.choices) + len(self.pairs)
        self.degradation = Row(np.zeros(size))
        for index, (name, bits) in enumerate(self.choices):
            self.degradation.values[index] = max(degradation[name][bits], FLOOR)
        self.costs = [self._row(entry, size) for entry in costs]
        self._fixed = [self._one_each(size), *self._steps(size)]

    def _row(self, costs: Costs, size: int) -> Row:
        values = np.zeros(size)
        for index, (name, bits) in enumerate(self.choices):
            values[index] = costs.layers[name][bits]
        for index, pair in enumerate(self.pairs):
            values[len(self.choices) + index] = costs.boundary.get(pair, 0.0)
        return Row(values, costs.constant)

    def _one_each(self, size: int) -> LinearConstraint:
        rank = {name: index for index, name in enumerate(self.errors)}
        rows = [rank[name] for name, _ in self.choices]
        return LinearConstraint(_matrix(np.ones(len(rows)), rows, range(len(rows)), (len(rank), size)), 1.0, 1.0)

    def _steps(self, size: int) -> list[LinearConstraint]:
        """The two inequalities z >= f - g and z >= g - f of every pair of neighbours."""
        data: list[tuple[int, int, float]] = []
        for index, (left, right) in enumerate(self.pairs):
            for row, sign in ((2 * index, 1.0), (2 * index + 1, -1.0)):
                data.append((row, len(self.choices) + index, 1.0))
                for name, side in ((left, -sign), (right, sign)):
                    if (name, FLOAT) in self._column:
                        data.append((row, self._column[name, FLOAT], side))
        if not data:
            return []
        rows, columns, values = zip(*data, strict=True)
        return [LinearConstraint(_matrix(values, rows, columns, (2 * len(self.pairs), size)), 0.0, np.inf)]

    def least(self, goal: Row, limits: Sequence[float]) -> Floats | None:
        """The binaries of the choice with the least `goal`, None when nothing meets the limits of the costs."""
        excluded: list[Floats] = []
        while len(excluded) < _TRIES:
            found = self._run(goal, limits, excluded)
            if found is None:
                return None
            over = (self.cost(index, found) - limit > 2 * SAME * abs(limit) for index, limit in enumerate(limits))
            if not any(over):
                return found
            excluded.append(found)
        return None

    def _run(self, goal: Row, limits: Sequence[float], excluded: Sequence[Floats]) -> Floats | None:
        size = len(self.choices) + len(self.pairs)
        rows = [self._bounded(row, limit) for row, limit in zip(self.costs, limits, strict=True) if np.isfinite(limit)]
        tie = sum((_scaled(row.values) for row in self.costs), np.zeros(size))  # the cheaper of two equal ones
        objective = _scaled(goal.values) + 1e-9 * _scaled(tie)
        whole = np.concatenate([np.ones(len(self.choices)), np.zeros(len(self.pairs))])
        with _silent():
            result: OptimizeResult = milp(
                objective,
                integrality=whole,
                bounds=Bounds(0.0, 1.0),
                constraints=[*self._fixed, *rows, *self._others(excluded)],
                options={"mip_rel_gap": 1e-9},
            )
        return np.round(result.x[: len(self.choices)]) if result.x is not None else None

    def _bounded(self, row: Row, limit: float) -> LinearConstraint:
        factor = _RANGE / max(np.abs(row.values).max(), 1e-300)
        room = limit + SAME * abs(limit) - row.constant
        return LinearConstraint(row.values[None] * factor, -np.inf, room * factor)

    def _others(self, excluded: Sequence[Floats]) -> Iterator[LinearConstraint]:
        """Anything but these solutions, which only the solver's tolerances let pass."""
        for solution in excluded:
            row = np.concatenate([solution, np.zeros(len(self.pairs))])
            yield LinearConstraint(row[None], -np.inf, solution.sum() - 1)

    def bits(self, found: Floats) -> dict[str, Bits]:
        """What every group gets in a solution."""
        return {name: bits for (name, bits), chosen in zip(self.choices, found, strict=True) if chosen > 0.5}

    def cost(self, index: int, found: Floats) -> float:
        """What a solution adds up to in the costs of this number."""
        return self.tables[index].total(self.bits(found))


def _useful(degradation: Degradations, costs: Sequence[Costs]) -> list[tuple[str, Bits]]:
    """The choices that no other of the same group beats in every respect; of equal ones, the first."""
    stepping = {name for entry in costs for pair in entry.boundary for name in pair}
    found: list[tuple[str, Bits]] = []
    for name, options in degradation.items():
        for entry in costs:
            for bits in options:
                if bits not in entry.layers.get(name, {}):
                    raise UsageError(f"the {entry.name} of {name!r} at {bits_text(bits)} is not known.")
        figures = {
            bits: (max(error, FLOOR), *(entry.layers[name][bits] for entry in costs)) for bits, error in options.items()
        }
        kept: list[Bits] = []
        for bits in sorted(options, key=lambda key: figures[key]):  # whoever beats it comes before it
            rivals = [rival for rival in kept if name not in stepping or (rival == FLOAT) == (bits == FLOAT)]
            if not any(all(a <= b for a, b in zip(figures[rival], figures[bits], strict=True)) for rival in rivals):
                kept.append(bits)
        found += [(name, bits) for bits in kept]
    return found


def _matrix(values: Iterable[float], rows: Iterable[int], columns: Iterable[int], shape: tuple[int, int]) -> csr_array:
    """A sparse matrix with 32-bit indices: the solver of scipy 1.11 takes no others."""
    places = [np.fromiter(indices, np.int32) for indices in (rows, columns)]
    return csr_array((np.fromiter(values, np.float64), (places[0], places[1])), shape=shape)


def _scaled(values: Floats) -> Floats:
    factor: float = _RANGE / max(float(np.abs(values).max(initial=0.0)), 1e-300)
    return values * factor
