"""Placement: which nodes run in integers, which tensors get a grid, and why the rest stays float.

Targets that want other tensors on grids than onnxruntime's CPU kernels are in `others`. The rules here come from
measurements of these kernels (docs/placement.md):

* A Conv becomes an integer kernel only when its output is quantized too, so its output is *forced* onto a grid.
  A Gemm or MatMul can return float: its output is quantized only when integer kernels read it.
* Element-wise nodes, pooling and data movement follow: they run in integers when at least one operand is on a grid
  because a Conv forced it, the others are, too, or were computed from such tensors (a float island inside an integer
  region), and somebody downstream wants integers. So convolutional networks end up whole in integers, and
  transformers keep float residuals, attention and normalisation.
* A tensor that reaches the graph's output is not quantized for the output's sake.

The largest set of units that satisfies this is found by starting with all candidates and removing offenders until
nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxq import graph, runtime
from onnxq.graph import Model, Value
from onnxq.plan.attention import FLOAT, Attention, cores, log_grids, with_products
from onnxq.plan.guards import guards, sums
from onnxq.plan.others import KEPT, Chosen, everything, names, operands
from onnxq.plan.units import Unit, is_depthwise, makers, readers, units_of
from onnxq.types import LogGrid
from onnxq.types.target import CPU, Target

REDUCES = ("GlobalAveragePool",)
"""Worth running in integers for their own sake: they read much and return little."""
ELEMENT_BY_ELEMENT = {
    "Add", "Mul", "Sub", "Div", "Clip", "Relu", "Elu", "Selu", "Celu", "PRelu", "LeakyRelu", "Sigmoid", "HardSigmoid",
    "HardSwish", "Swish", "Tanh", "Softplus", "Mish", "Gelu", "Erf", "Exp", "Pow", "Sqrt", "Abs", "Neg", "Min", "Max",
}  # fmt: skip
"""Operators that activations are made of."""


@dataclass(frozen=True)
class Placement:
    """Where each node runs, before any number is known.

    Attributes:
        units: All units in graph order.
        integer: Those that run in integers.
        tensors: Names of the tensors that need a grid, in graph order.
        fixed: Those of them whose float value no longer exists: float nodes read the grid, too.
        skipped: Node name -> why it stays in float.
        guards: Tensors behind which a one-input Sum keeps the runtime from fusing.
        sums: Add nodes to be written as Sum, so that the runtime does not fuse them.
        tables: Gather nodes that look up rows of a large constant table.
        attention_bits: Bits of the operands of the integer units of kind "product"; 0 where there are none.
        log_softmax: Softmax nodes whose result those units read from a logarithmic grid.
        target: What it is made for.
    """

    units: tuple[Unit, ...]
    integer: frozenset[Unit]
    tensors: tuple[str, ...]
    fixed: frozenset[str]
    skipped: dict[str, str]
    guards: tuple[str, ...]
    sums: tuple[str, ...]
    tables: tuple[str, ...]
    attention_bits: int = 0
    log_softmax: Mapping[str, LogGrid] = field(default_factory=dict)
    target: Target = CPU

    @property
    def layers(self) -> list[Unit]:
        """Integer units with weights, in graph order."""
        return [unit for unit in self.units if unit in self.integer and unit.kind == "layer"]


def place(
    model: Model,
    *,
    keep_float: Iterable[str] = (),
    refuse: Mapping[str, str] | None = None,
    attention: Attention = FLOAT,
    target: Target = CPU,
) -> Placement:
    """Decide what runs in integers.

    Args:
        model: The prepared float model; left as it is.
        keep_float: Names of nodes that must stay in float.
        refuse: Tensors that must not be quantized -> why (values that calibration found unusable).
        attention: How the products of attention are quantized; by default they are not.
        target: Whose rules hold; one that computes in float16 gets no integers.
    """
    keep, refused = set(keep_float), refuse or {}
    whole = target.placing == "everything"
    found = [core for core in cores(model) if core.softmax.name not in keep] if attention.bits and not whole else []
    units = units_of(model, absorb=not whole, silu=target.fused and runtime.fuses_silu(), apart=keep)
    choosing = {"kernels": _kernels, "operands": operands, "everything": everything}
    if target.placing in choosing:
        chosen = choosing[target.placing](with_products(units, found, attention), keep, refused)
    else:
        chosen = Chosen(tuple(units), frozenset(), (), frozenset(), {})
    tensors = frozenset(chosen.tensors)
    return Placement(
        units=chosen.units,
        integer=chosen.integer,
        tensors=chosen.tensors,
        fixed=chosen.fixed,
        skipped=chosen.skipped,
        guards=guards(chosen.units, chosen.integer, tensors, chosen.fixed) if target.guarded else (),
        sums=sums(chosen.units, chosen.integer) if target.guarded else (),
        tables=tuple(name for name in _tables(model) if name not in keep) if target.tables else (),
        attention_bits=attention.bits,
        log_softmax=log_grids(found, chosen.integer, attention),
        target=target,
    )


def _kernels(units: list[Unit], keep: set[str], refuse: Mapping[str, str]) -> Chosen:
    """What the kernels of the CPU absorb."""
    solver = _Solver(units, keep, refuse)
    solver.solve()
    integer = frozenset(solver.integer)
    values = _tensors(units, integer, solver)
    fixed = frozenset(name for name, value in values.items() if solver.fixed(value))
    return Chosen(tuple(units), integer, tuple(values), fixed, solver.skipped)


class _Solver:
    """Shrinks the set of integer units until every member has what it needs."""

    def __init__(self, units: list[Unit], keep_float: set[str], refuse: Mapping[str, str]) -> None:
        self.units = units
        self.maker = makers(units)
        self.readers = readers(units)
        self.refuse = refuse
        self.skipped: dict[str, str] = {}
        self.integer: set[Unit] = set()
        for unit in units:
            if any(member.name in keep_float for member in unit.members):
                self._skip(unit, KEPT)
            elif unit.kind == "float":
                self._skip(unit, unit.reason)
            else:
                self.integer.add(unit)

    def _skip(self, unit: Unit, reason: str) -> None:
        self.integer.discard(unit)
        self.skipped[unit.name] = reason

    def solve(self) -> None:
        changed = True
        while changed:
            forced, near, hot = self._forced()
            changed = False
            for unit in self.units:
                reason = self._offence(unit, forced, near, hot) if unit in self.integer else ""
                if reason:
                    self._skip(unit, reason)
                    changed = True

    def _forced(self) -> tuple[set[Value], set[Value], set[Value]]:
        """Three growing sets of values.

        forced: on a grid because a Conv upstream leaves no choice. hot: those, and what is computed element by element
        from nothing else (a decomposed activation). near: computed from any forced value.
        """
        forced: set[Value] = set()
        hot: set[Value] = set()
        near: set[Value] = set()
        for unit in self.units:
            inside = unit in self.integer and not unit.linear
            if inside and (unit.kind == "layer" or any(value in forced for value in unit.inputs)):
                forced.update(unit.outputs)
                hot.update(unit.outputs)
            elif unit.node.op_type in ELEMENT_BY_ELEMENT and all(value in hot for value in unit.inputs):
                hot.update(unit.outputs)
            if not unit.linear and any(value in forced or value in near for value in unit.inputs):
                near.update(unit.outputs)
        return forced, near, hot

    def _offence(self, unit: Unit, forced: set[Value], near: set[Value], hot: set[Value]) -> str:
        for name in names((*unit.inputs, *unit.outputs)):
            if name in self.refuse:
                return self.refuse[name]
        if unit.kind == "product":
            return ""
        if unit.layer is not None:
            return self._lone_depthwise(unit, hot)
        for value in unit.inputs:
            if self.maker.get(value) not in self.integer and value not in near:
                return "an operand is float"
        if not any(value in forced for value in unit.inputs):
            return "its operands are float at no extra cost"
        if unit.node.op_type not in REDUCES and not self._wanted(unit):
            return "nothing behind it reads integers"
        return ""

    def _wanted(self, unit: Unit) -> bool:
        return any(reader in self.integer for value in unit.outputs for reader in self.readers.get(value, ()))

    def _lone_depthwise(self, unit: Unit, hot: set[Value]) -> str:
        assert unit.layer is not None
        if not is_depthwise(unit.layer):
            return ""
        if unit.inputs[0] in hot or self._wanted(unit):
            return ""
        return "a depthwise convolution between float nodes is faster in float"

    def returns_grid(self, unit: Unit) -> bool:
        """Whether the outputs of an integer unit are quantized."""
        return not unit.linear or self._wanted(unit)

    def fixed(self, value: Value) -> bool:
        """Whether every reader of a quantized `value` has to read it from its grid."""
        unit = self.maker.get(value)
        if unit is None or unit not in self.integer:
            return False
        if not unit.linear:
            return True
        inside = all(reader in self.integer for reader in self.readers.get(value, ()))
        return inside and not value.is_graph_output() and len(graph.users(value)) > 0


def _tensors(units: list[Unit], integer: frozenset[Unit], solver: _Solver) -> dict[str, Value]:
    found: dict[str, Value] = {}
    for unit in units:
        if unit not in integer:
            continue
        found.update((graph.name_of(value), value) for value in unit.inputs)
        if solver.returns_grid(unit):
            found.update((graph.name_of(value), value) for value in unit.outputs if value.name)
    return found


TABLE_ELEMENTS = 16_384
"""Smaller tables are not worth an extra node."""


def _tables(model: Model) -> Iterable[str]:
    """Row look-ups in a large, finite, constant float table (token embeddings)."""
    for node in graph.nodes(model, "Gather"):
        table = graph.constant(node.inputs[0])
        if table is None or table.ndim != 2 or table.dtype.name != "float32" or table.size < TABLE_ELEMENTS:
            continue
        rows = graph.attribute(node, "axis", 0) == 0 and graph.constant(node.inputs[1]) is None
        if rows and np.isfinite(table).all():
            yield str(node.name)
