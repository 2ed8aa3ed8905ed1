"""Tensors that share one grid.

Tensors that an operator only moves share one grid. The operands and the result of a Concat share one when the
constraints of their producers allow it: the result has the union's resolution anyway, and the runtime then copies
bytes. A producer that absorbed a Relu or Clip keeps its range inside that activation's bounds, which is what lets
the runtime drop the activation.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce

import numpy as np

from onnxq import graph
from onnxq.plan.placement import Placement
from onnxq.plan.units import Unit


@dataclass(frozen=True)
class Range:
    """A clipped float interval, the rule that found it, and whether it was judged by the layers behind the tensor."""

    low: float
    high: float
    rule: str
    judged: bool = False

    def union(self, other: Range) -> Range:
        """The smallest range that holds both."""
        rule = self.rule if self.rule == other.rule else f"{self.rule}|{other.rule}"
        return Range(min(self.low, other.low), max(self.high, other.high), rule, self.judged and other.judged)


class Groups:
    """Tensors that share one grid, with the union of their ranges."""

    def __init__(self, placement: Placement, ranges: Mapping[str, Range]) -> None:
        self.parent = {name: name for name in placement.tensors}
        self.bounds: dict[str, tuple[float, float]] = dict.fromkeys(placement.tensors, (-np.inf, np.inf))
        integer = [unit for unit in placement.units if unit in placement.integer]
        self.lone = {
            str(value.name): graph.only_user(value) is not None
            for unit in integer
            for value in (*unit.inputs, *unit.outputs)
        }
        for unit in integer:
            if unit.kind != "move":
                for value in unit.outputs:
                    if value.name in self.bounds:
                        self.bounds[str(value.name)] = (unit.low, unit.high)
        self.ranges = {name: _clip(ranges[name], *self.bounds[name]) for name in placement.tensors}
        for unit in integer:
            if unit.kind == "move":
                self._tie_move(unit)
        for unit in integer:
            if unit.kind == "concat":
                self._tie_concat(unit)

    def find(self, name: str) -> str:
        """The tensor that stands for the group of `name`."""
        while self.parent[name] != name:
            name = self.parent[name]
        return name

    def range_of(self, name: str) -> Range:
        """The range of the group of `name`."""
        return self.ranges[self.find(name)]

    def _lone(self, roots: Collection[str]) -> bool:
        """Whether all tensors of these groups have a single reader."""
        return all(self.lone[name] for name in self.parent if self.find(name) in roots)

    def _tie_move(self, unit: Unit) -> None:
        """What moves keeps the grid of where it came from: its values are among those values.

        Where only layers behind the move can judge a range, theirs is taken.
        """
        source = self.find(graph.name_of(unit.inputs[0]))
        roots = [self.find(str(value.name)) for value in unit.outputs if value.name in self.parent]
        moved = reduce(Range.union, (self.ranges[root] for root in roots))
        if moved.judged and not self.ranges[source].judged and self._lone([source]):
            self.ranges[source] = _clip(moved, *self.bounds[source])
        for root in roots:
            self.parent[root] = source

    def _tie_concat(self, unit: Unit) -> None:
        names = [graph.name_of(value) for value in (*unit.inputs, *unit.outputs) if value.name in self.parent]
        roots = list(dict.fromkeys(self.find(name) for name in names))
        union = self._joint(unit, roots)
        low, high = -np.inf, np.inf
        for root in roots:
            low, high = max(low, self.bounds[root][0]), min(high, self.bounds[root][1])
        if union.low < low or union.high > high or self._costly(unit, union):
            return
        for root in roots:
            self.parent[root] = roots[0]
        self.ranges[roots[0]], self.bounds[roots[0]] = union, (low, high)

    def _joint(self, unit: Unit, roots: list[str]) -> Range:
        """The range of what was concatenated, if layers judged it and nobody else reads the parts; else the union."""
        whole = self.range_of(graph.name_of(unit.output)) if unit.output.name in self.parent else None
        if whole is not None and whole.judged and self._lone([self.find(str(value.name)) for value in unit.inputs]):
            return whole
        union = self.ranges[roots[0]]
        for root in roots:
            union = union.union(self.ranges[root])
        return union

    def _costly(self, unit: Unit, union: Range) -> bool:
        """Whether a narrow operand that is also read elsewhere would lose more than one bit."""
        for value in unit.inputs:
            own = self.range_of(str(value.name)) if value.name in self.parent else union
            if len(graph.users(value)) > 1 and 2 * (own.high - own.low) < union.high - union.low:
                return True
        return False


def _clip(found: Range, low: float, high: float) -> Range:
    return Range(max(found.low, low), min(found.high, high), found.rule, found.judged)
