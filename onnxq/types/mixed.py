"""Mixed precision: what layers cost at each number of bits, and what was chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Bits = tuple[int, int]
"""Weight bits and activation bits of a layer."""
FLOAT: Bits = (32, 32)
"""A layer that stays in float."""
BASE: Bits = (8, 8)
"""What the bits of one layer are measured against: everything at 8 bits."""


def bits_text(bits: Bits) -> str:
    """As people write it: "w4a8", or "float"."""
    return "float" if bits == FLOAT else f"w{bits[0]}a{bits[1]}"


@dataclass(frozen=True)
class Added:
    """Error that one group of layers adds at some bits.

    Attributes:
        output: Distance of the model's outputs from the base's: noise power over signal power, mean over the outputs.
        block: At the outputs of the last block that holds one of the layers: noise power over signal power.
    """

    output: float
    block: float


@dataclass(frozen=True)
class Sensitivities:
    """Errors of all layers at all bits that were tried, each with everything else at 8 bits.

    Attributes:
        base: Error at the model's outputs with all layers at 8 bits.
        groups: Layers whose inputs share a grid, by the name of the first one; they get the same bits.
        added: Group -> bits -> the error they add.
        rows: Number of rows measured on.
    """

    base: float
    groups: Mapping[str, tuple[str, ...]]
    added: Mapping[str, Mapping[Bits, Added]]
    rows: int


@dataclass(frozen=True)
class Costs:
    """What every layer costs at each number of bits.

    Attributes:
        name: What is counted, as people read it ("size").
        unit: Of all figures ("bytes").
        layers: Layer or group -> bits -> cost.
        constant: What the rest of the model costs.
        boundary: Pairs of neighbours -> what the step between integers and float costs where one of them runs in
            integers and the other in float; not negative.
    """

    name: str
    unit: str
    layers: Mapping[str, Mapping[Bits, float]]
    constant: float = 0.0
    boundary: Mapping[tuple[str, str], float] = field(default_factory=dict)

    def total(self, bits: Mapping[str, Bits]) -> float:
        """Cost of the whole model."""
        crossed = sum(
            cost for (left, right), cost in self.boundary.items() if (bits[left] == FLOAT) != (bits[right] == FLOAT)
        )
        return self.constant + sum(self.layers[name][chosen] for name, chosen in bits.items()) + crossed

    def grouped(self, groups: Mapping[str, tuple[str, ...]]) -> Costs:
        """The same with one entry per group of layers: the sum over its layers, for the bits that all of them have."""
        home = {layer: group for group, layers in groups.items() for layer in layers}
        sums: dict[str, dict[Bits, float]] = {}
        for group, layers in groups.items():
            shared = [bits for bits in self.layers[layers[0]] if all(bits in self.layers[name] for name in layers)]
            sums[group] = {bits: sum(self.layers[name][bits] for name in layers) for bits in shared}
        edges: dict[tuple[str, str], float] = {}
        for (left, right), cost in self.boundary.items():
            pair = (home.get(left, left), home.get(right, right))
            if pair[0] != pair[1]:
                edges[pair] = edges.get(pair, 0.0) + cost
        return Costs(self.name, self.unit, sums, self.constant, edges)


@dataclass(frozen=True)
class Budget:
    """Costs, and the most that they may add up to."""

    costs: Costs
    limit: float


@dataclass(frozen=True)
class Allocation:
    """Bits for every layer or group.

    Attributes:
        bits: What each one gets.
        degradation: The sum of the errors they add, as predicted.
        costs: Total by name of the costs.
        measured: Distance of its outputs from the base's; None when not measured.
    """

    bits: Mapping[str, Bits]
    degradation: float
    costs: Mapping[str, float]
    measured: float | None = None


@dataclass(frozen=True)
class Study:
    """One run of `sensitivity`, as reports show it.

    Attributes:
        source: The float file.
        float_bytes: Its size.
        known: What every layer adds.
        front: Points of size against degradation, the largest first.
        additivity: Rank correlation of predicted and measured degradation along the front; None where the points
            were not measured.
    """

    source: str
    float_bytes: int
    known: Sensitivities
    front: tuple[Allocation, ...]
    additivity: float | None = None
