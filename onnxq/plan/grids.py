"""From ranges to grids: the second half of a plan.

Tensors that an operator only moves share one grid. The operands and the result of a Concat share one when the
constraints of their producers allow it: the result has the union's resolution anyway, and the runtime then copies
bytes. A producer that absorbed a Relu or Clip keeps its range inside that activation's bounds, which is what lets
the runtime drop the activation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

import numpy as np

from onnxq import graph
from onnxq.graph import Model
from onnxq.grid import Grid
from onnxq.plan.placement import Placement
from onnxq.plan.units import Unit
from onnxq.plan.weights import weight_grid
from onnxq.types import QuantPlan, TensorGrid, WeightGrid
from onnxq.types.mixed import Bits


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


@dataclass(frozen=True)
class Precision:
    """Bit widths and granularity of a plan.

    Attributes:
        weight_bits: Bits of the weights of integer layers.
        activation_bits: Bits of the inputs of layers.
        per_channel: One weight step per output channel.
        first_last: Bits of the weights and input of the first and last layer.
        residual_bits: Bits of tensors that only feed sums or move.
        narrow: Layers (node names) whose weights get 7 bits, for processors that would saturate.
        layers: Layers (node names) with (weight bits, activation bits) of their own, which hold before all of the
            above but `narrow`. Where readers of one tensor ask for different activation bits, the larger number holds.
        granularity: Layers whose `per_channel` is their own.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    per_channel: bool = True
    first_last: int = 8
    residual_bits: int = 8
    narrow: frozenset[str] = field(default_factory=frozenset)
    layers: Mapping[str, Bits] = field(default_factory=dict)
    granularity: Mapping[str, bool] = field(default_factory=dict)

    def bits_of(self, name: str, *, ends: bool) -> Bits:
        """(weight bits, activation bits) of a layer.

        Args:
            name: Its node's name.
            ends: Whether it is the first or last layer.
        """
        uniform = (self.first_last, self.first_last) if ends else (self.weight_bits, self.activation_bits)
        weights, activations = self.layers.get(name, uniform)
        return min(weights, 7) if name in self.narrow else weights, activations


def make_plan(
    model: Model,
    placement: Placement,
    ranges: Mapping[str, Range],
    precision: Precision = Precision(),
    *,
    target: str = "cpu",
) -> QuantPlan:
    """Give every tensor and weight of `placement` its grid.

    Args:
        model: The prepared float model.
        placement: Where nodes run.
        ranges: A range for every tensor of `placement.tensors`.
        precision: Bit widths.
        target: Name of the target profile, recorded.
    """
    tensors = _tensors(placement, ranges, precision)
    return QuantPlan(
        target=target,
        source=graph.digest(model),
        tensors=tensors,
        weights=_weights(placement, tensors, precision, {}, {}),
        integer=tuple(unit.name for unit in placement.units if unit in placement.integer),
        skipped=dict(placement.skipped),
        guards=placement.guards,
        sums=placement.sums,
        constants=_constants(placement),
        tables=placement.tables,
        log_softmax=placement.log_softmax,
    )


def with_precision(
    plan: QuantPlan, placement: Placement, ranges: Mapping[str, Range], precision: Precision
) -> QuantPlan:
    """The plan that `make_plan` gives for other bit widths; only what changes is computed.

    Args:
        plan: Made by `make_plan` from the same placement, with the same granularity in `precision`.
        placement: Where nodes run.
        ranges: A range for every tensor of `placement.tensors`; other ones than the plan's are allowed.
        precision: Bit widths.
    """
    tensors = _tensors(placement, ranges, precision)
    return replace(plan, tensors=tensors, weights=_weights(placement, tensors, precision, plan.weights, plan.tensors))


def _tensors(placement: Placement, ranges: Mapping[str, Range], precision: Precision) -> dict[str, TensorGrid]:
    grouped = Groups(placement, ranges)
    bits = activation_bits(placement, grouped, precision)
    found: dict[str, TensorGrid] = {}
    for name in placement.tensors:
        chosen = grouped.range_of(name)
        scale, zero_point = Grid(bits[name], signed=False, symmetric=False).from_range(chosen.low, chosen.high)
        found[name] = TensorGrid(scale, zero_point, bits[name], False, name in placement.fixed, chosen.rule)
    return found


def activation_bits(placement: Placement, groups: Groups, precision: Precision) -> dict[str, int]:
    """Bits of every tensor: those of the layer or product of attention that reads it, else `residual_bits`.

    Tensors that share a grid share its bits; where readers disagree, the larger number holds.
    """
    wanted: dict[str, int] = {}
    for unit, (_, bits) in _layer_bits(placement, precision):
        root = groups.find(graph.name_of(unit.inputs[0]))
        wanted[root] = max(bits, wanted.get(root, 0))
    for unit in placement.units:
        if unit.kind == "product" and unit in placement.integer:
            for root in (groups.find(graph.name_of(value)) for value in unit.inputs):
                wanted[root] = max(placement.attention_bits, wanted.get(root, 0))
    return {name: wanted.get(groups.find(name), precision.residual_bits) for name in placement.tensors}


def _layer_bits(placement: Placement, precision: Precision) -> Iterator[tuple[Unit, Bits]]:
    layers = placement.layers
    for index, unit in enumerate(layers):
        yield unit, precision.bits_of(unit.name, ends=index in (0, len(layers) - 1))


def tied_layers(placement: Placement, groups: Groups) -> tuple[tuple[str, ...], ...]:
    """Names of the integer layers whose inputs share a grid, and so their activation bits; in graph order."""
    found: dict[str, list[str]] = {}
    for unit in placement.layers:
        found.setdefault(groups.find(graph.name_of(unit.inputs[0])), []).append(unit.name)
    return tuple(tuple(names) for names in found.values())


def _weights(
    placement: Placement,
    tensors: Mapping[str, TensorGrid],
    precision: Precision,
    known: Mapping[str, WeightGrid],
    known_tensors: Mapping[str, TensorGrid],
) -> dict[str, WeightGrid]:
    """A grid for every layer; one of `known` where its bits and its input's step are those wanted."""
    found: dict[str, WeightGrid] = {}
    for unit, (bits, _) in _layer_bits(placement, precision):
        layer = unit.layer
        assert layer is not None
        data = graph.name_of(layer.data)
        old = known.get(unit.name)
        if old is not None and old.bits == bits and known_tensors[data].scale == tensors[data].scale:
            found[unit.name] = old
            continue
        axis = layer.axis if precision.granularity.get(unit.name, precision.per_channel) else None
        found[unit.name] = weight_grid(layer.weight, layer.bias, bits, axis, tensors[data].scale)
    return found


def _constants(placement: Placement) -> dict[str, TensorGrid]:
    grid = Grid(8, signed=False, symmetric=False)
    found: dict[str, TensorGrid] = {}
    for unit in placement.units:
        if unit not in placement.integer:
            continue
        for value in unit.constants:
            array = graph.constant(value)
            assert array is not None
            scale, zero_point = grid.from_range(float(array.min()), float(array.max()))
            found[graph.name_of(value)] = TensorGrid(scale, zero_point, rule="constant")
    return found


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
