"""From ranges to grids: the second half of a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from onnxq import graph
from onnxq.graph import Model
from onnxq.grid import FloatArray, Grid
from onnxq.plan.codebook import codebook_grid, short
from onnxq.plan.groups import Groups, Range
from onnxq.plan.placement import Placement
from onnxq.plan.units import Unit
from onnxq.plan.weights import weight_grid
from onnxq.types import QuantPlan, TensorGrid, WeightGrid
from onnxq.types.mixed import Bits
from onnxq.types.target import Target


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
        codebook_bits: Bits of an index into a codebook, which the weights of all layers but the first, the last and
            those of short channels get instead of `weight_bits`; 0 for none.
        codebooks: Layers whose `codebook_bits` are their own.
    """

    weight_bits: int = 8
    activation_bits: int = 8
    per_channel: bool = True
    first_last: int = 8
    residual_bits: int = 8
    narrow: frozenset[str] = field(default_factory=frozenset)
    layers: Mapping[str, Bits] = field(default_factory=dict)
    granularity: Mapping[str, bool] = field(default_factory=dict)
    codebook_bits: int = 0
    codebooks: Mapping[str, int] = field(default_factory=dict)

    def bits_of(self, name: str, *, ends: bool) -> Bits:
        """(weight bits, activation bits) of a layer.

        Args:
            name: Its node's name.
            ends: Whether it is the first or last layer.
        """
        uniform = (self.first_last, self.first_last) if ends else (self.weight_bits, self.activation_bits)
        weights, activations = self.layers.get(name, uniform)
        return min(weights, 7) if name in self.narrow else weights, activations

    def book_of(self, name: str, weight: FloatArray, axis: int, *, ends: bool) -> int:
        """Bits of an index into a layer's codebook, 0 where it has none.

        Args:
            name: Its node's name.
            weight: Its weight.
            axis: The output channels of that.
            ends: Whether it is the first or last layer.
        """
        return self.codebooks.get(name, 0 if ends or short(weight, axis) else self.codebook_bits)


def make_plan(
    model: Model,
    placement: Placement,
    ranges: Mapping[str, Range],
    precision: Precision = Precision(),
) -> QuantPlan:
    """Give every tensor and weight of `placement` its grid.

    Args:
        model: The prepared float model.
        placement: Where nodes run, and for what target.
        ranges: A range for every tensor of `placement.tensors`.
        precision: Bit widths.
    """
    tensors = _tensors(placement, ranges, precision)
    return QuantPlan(
        target=placement.target.name,
        source=graph.digest(model),
        tensors=tensors,
        weights=_weights(placement, tensors, precision, {}, {}),
        integer=tuple(unit.name for unit in placement.units if unit in placement.integer),
        skipped=dict(placement.skipped),
        guards=placement.guards,
        sums=placement.sums,
        constants=_constants(placement, precision),
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
        grid = activation_grid(placement.target, bits[name])
        scale, zero_point = grid.from_range(chosen.low, chosen.high)
        found[name] = TensorGrid(scale, zero_point, bits[name], grid.signed, name in placement.fixed, chosen.rule)
    return found


def activation_grid(target: Target, bits: int) -> Grid:
    """The grid of activations of a target."""
    return Grid(bits, signed=target.signed, symmetric=target.signed)


def activation_bits(placement: Placement, groups: Groups, precision: Precision) -> dict[str, int]:
    """Bits of every tensor: those of the layer or product of attention that reads it, else `residual_bits`.

    Tensors that share a grid share its bits; where readers disagree, the larger number holds. A target that computes
    everything in integers has one width for all.
    """
    if placement.target.placing == "everything":
        return dict.fromkeys(placement.tensors, precision.activation_bits)
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
    for unit, ends in _at_ends(placement):
        yield unit, precision.bits_of(unit.name, ends=ends)


def _at_ends(placement: Placement) -> Iterator[tuple[Unit, bool]]:
    """The integer layers, and whether each is the first or the last."""
    layers = placement.layers
    for index, unit in enumerate(layers):
        yield unit, index in (0, len(layers) - 1)


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
    for unit, ends in _at_ends(placement):
        layer, (bits, _) = unit.layer, precision.bits_of(unit.name, ends=ends)
        assert layer is not None
        data, book = graph.name_of(layer.data), precision.book_of(unit.name, layer.weight, layer.axis, ends=ends)
        old = known.get(unit.name)
        if old is not None and old.bits == (book or bits) and known_tensors[data].scale == tensors[data].scale:
            found[unit.name] = old
            continue
        wanted = precision.granularity.get(unit.name, precision.per_channel)
        axis = layer.axis if wanted and unit.node.op_type in placement.target.per_channel else None
        scale, widest = tensors[data].scale, 7 if unit.name in precision.narrow else 8
        if book:
            found[unit.name] = codebook_grid(layer.weight, layer.bias, book, axis, scale, widest=widest)
        else:
            found[unit.name] = weight_grid(layer.weight, layer.bias, bits, axis, scale)
    return found


def _constants(placement: Placement, precision: Precision) -> dict[str, TensorGrid]:
    bits = precision.activation_bits if placement.target.placing == "everything" else 8
    grid = activation_grid(placement.target, bits)
    found: dict[str, TensorGrid] = {}
    for unit in placement.units:
        if unit not in placement.integer:
            continue
        for value in unit.constants:
            array = graph.constant(value)
            assert array is not None
            scale, zero_point = grid.from_range(float(array.min()), float(array.max()))
            found[graph.name_of(value)] = TensorGrid(scale, zero_point, bits, grid.signed, rule="constant")
    return found
