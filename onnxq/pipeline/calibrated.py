"""A float model with everything that a plan at any number of bits needs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from onnxq.errors import UsageError
from onnxq.graph import Model
from onnxq.plan import Groups, Placement, Precision, Range, activation_bits, make_plan, place
from onnxq.plan.grids import tied_layers, with_precision
from onnxq.types import QuantPlan
from onnxq.types.mixed import BASE, FLOAT, Bits


class Calibrated:
    """A float model, and plans for it at any number of bits.

    Args:
        model: The prepared float model.
        placement: Where nodes run.
        ranges: Activation bits -> a range for every tensor of `placement.tensors`; 8 bits must be there.
        precision: Granularity and the like; the bits in it do not matter.

    Attributes:
        base: The plan with all layers at 8 bits.
        groups: Layers whose inputs share a grid, by the name of the first one.
    """

    def __init__(
        self, model: Model, placement: Placement, ranges: Mapping[int, Mapping[str, Range]], precision: Precision
    ) -> None:
        self.model, self.placement, self.ranges = model, placement, ranges
        weights, activations = BASE
        self.precision = replace(
            precision, weight_bits=weights, activation_bits=activations, first_last=weights, layers={}
        )
        self._grids = Groups(placement, ranges[activations])
        self.base = make_plan(model, placement, ranges[activations], self.precision)
        self.groups = {names[0]: names for names in tied_layers(placement, self._grids)}

    def plan(self, bits: Mapping[str, Bits]) -> QuantPlan:
        """The plan with these bits, by layer; the other layers have 8.

        Raises:
            UsageError: There are no ranges for some activation bits, or a layer is to stay in float: that is for
                `place` to arrange.
        """
        if FLOAT in bits.values():
            raise UsageError("a plan cannot leave layers in float; a placement can.")
        precision = replace(self.precision, layers=dict(bits))
        counts = activation_bits(self.placement, self._grids, precision)
        for count in counts.values():
            if count not in self.ranges:
                raise UsageError(f"no ranges were chosen for activations of {count} bits.")
        ranges = {name: self.ranges[count][name] for name, count in counts.items()}
        return with_precision(self.base, self.placement, ranges, precision)

    def keeping_float(self, layers: Collection[str]) -> Calibrated:
        """The same model with these layers in float, too."""
        old = self.placement
        asked = {*layers, *old.skipped}
        placement = place(self.model, keep_float=asked, target=old.target)
        unseen = {name: "no range was observed" for name in placement.tensors if name not in self.ranges[BASE[1]]}
        if unseen:
            placement = place(self.model, keep_float=asked, refuse=unseen, target=old.target)
        placement = replace(placement, tables=old.tables, skipped={**placement.skipped, **old.skipped})
        return Calibrated(self.model, placement, self.ranges, self.precision)

    def by_layer(self, bits: Mapping[str, Bits]) -> dict[str, Bits]:
        """Bits of layers from bits of groups."""
        return {layer: chosen for group, chosen in bits.items() for layer in self.groups[group]}
