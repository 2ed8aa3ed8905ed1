"""A plan for another target.

Placement is decided anew, and grids come from the ranges that the plan's grids cover: a symmetric grid keeps the larger
end. Weights keep their steps and codes wherever the target takes such steps; what else was learned stays, too. Tensors
that the plan has no grid for need a range that was seen; without one, their nodes stay in float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from onnxq import graph
from onnxq.emit import weight_codes
from onnxq.errors import UnsupportedError
from onnxq.graph import Layer, Model
from onnxq.grid import Grid
from onnxq.plan import Placement, Precision, Range, make_plan, place, room_for_bias
from onnxq.plan.attention import Attention
from onnxq.plan.half import block_layers, half_plan
from onnxq.plan.others import KEPT
from onnxq.types import QuantPlan, TensorGrid, Tuned, WeightGrid
from onnxq.types.mixed import Bits
from onnxq.types.target import TARGETS, Target

UNKNOWN = "the plan holds no range of its tensors"


def retarget(model: Model, tuned: Tuned, target: Target, ranges: Mapping[str, tuple[float, float]]) -> Tuned:
    """A plan and what was learned for it, for another target.

    Args:
        model: The prepared float model.
        tuned: For its old target.
        target: The new one.
        ranges: (smallest, largest) of tensors that the plan has no grid for.

    Raises:
        UnsupportedError: No layer runs in integers there.
    """
    plan = tuned.plan
    known = {name: Range(low, high, "seen") for name, (low, high) in ranges.items()}
    known |= {name: _range(grid, known.get(name)) for name, grid in plan.tensors.items()}
    keep = _kept(model, plan)
    if target.placing == "half":
        ends = {name: (found.low, found.high) for name, found in known.items()}
        few = [name for name, grid in plan.weights.items() if grid.bits == 4 and not grid.values]
        few += [name for name, block in plan.blocks.items() if block.bits == 4]
        blocks = block_layers(model, target, few)
        return Tuned(half_plan(model, ends, target, keep_float=keep, blocks=blocks))
    placement = _placed(model, target, keep, known, _attention(model, plan, target))
    if not placement.layers:
        raise UnsupportedError(
            f"no layer of this model runs in integers on {target.name} with the ranges of this plan."
        )
    precision = Precision(
        activation_bits=_nearest(max((grid.bits for grid in plan.tensors.values()), default=8), target),
        per_channel=not plan.weights or any(grid.axis is not None for grid in plan.weights.values()),
        layers={unit.name: _bits(plan, unit.layer, target) for unit in placement.layers if unit.layer is not None},
    )
    made = make_plan(model, placement, known, precision)
    layers = {unit.name: unit.layer for unit in placement.layers if unit.layer is not None}
    same = {name for name, layer in layers.items() if _keeps(plan.weights.get(name), made, layer, target)}
    weights = {name: plan.weights[name] if name in same else grid for name, grid in made.weights.items()}
    made = replace(made, weights=weights)
    codes = {
        name: old if name in same else replace(old, codes=weight_codes(layers[name], weights[name]))
        for name, old in tuned.layers.items()
        if name in layers
    }
    return Tuned(made, codes)


def _range(grid: TensorGrid, seen: Range | None) -> Range:
    """The interval that a grid covers, of a symmetric one the part in which there are values."""
    codes = Grid(grid.bits, grid.signed, symmetric=grid.signed and grid.zero_point == 0)
    low, high = ((code - grid.zero_point) * grid.scale for code in (codes.qmin, codes.qmax))
    if seen is not None and codes.symmetric:
        low, high = max(low, min(seen.low, 0.0)), min(high, max(seen.high, 0.0))
    return Range(low, high, grid.rule, judged=True)


def _kept(model: Model, plan: QuantPlan) -> set[str]:
    """Nodes that the plan leaves in float although its target need not."""
    free = place(model, target=TARGETS[plan.target]).layers
    taken = {*plan.weights, *plan.blocks, *plan.half}
    return {unit.name for unit in free if unit.name not in taken} | {
        name for name, reason in plan.skipped.items() if reason == KEPT
    }


def _placed(
    model: Model, target: Target, keep: set[str], known: Mapping[str, Range], attention: Attention
) -> Placement:
    """The placement, without tensors whose range nobody knows."""
    refused: dict[str, str] = {}
    while True:
        placement = place(model, target=target, keep_float=keep, refuse=refused, attention=attention)
        unknown = [name for name in placement.tensors if name not in known]
        if not unknown:
            return placement
        refused |= dict.fromkeys(unknown, UNKNOWN)


def _attention(model: Model, plan: QuantPlan, target: Target) -> Attention:
    """How the plan quantizes the products of attention, as far as the target can."""
    nodes = graph.node_names(model)
    layers = [nodes[name] for name in plan.integer if nodes[name].op_type == "MatMul" and name not in plan.weights]
    bits = [
        plan.tensors[str(value.name)].bits
        for node in layers
        for value in node.inputs
        if value and value.name in plan.tensors
    ]
    if not bits or target.placing == "everything":
        return Attention()
    few = max(bits) in target.activation_bits and bool(plan.log_softmax)
    grid = next(iter(plan.log_softmax.values()), None)
    kind = "uniform" if grid is None or not few else ("log-sqrt2" if grid.per_octave == 2 else "log2")
    return Attention(_nearest(max(bits), target), kind)


def _bits(plan: QuantPlan, layer: Layer, target: Target) -> Bits:
    """(weight bits, activation bits) of a layer on the new target."""
    name = str(layer.node.name)
    weights, data = plan.weights.get(name), plan.tensors.get(graph.name_of(layer.data))
    stored = plan.blocks[name].bits if name in plan.blocks else 8
    return stored if weights is None else _width(weights), _nearest(8 if data is None else data.bits, target)


def _width(grid: WeightGrid) -> int:
    """Bits of the codes: those of codebooks lie anywhere in int8."""
    return 8 if grid.values else grid.bits


def _nearest(bits: int, target: Target) -> int:
    """The smallest width of activations that holds `bits`, or the largest that the target has."""
    return min((width for width in target.activation_bits if width >= bits), default=max(target.activation_bits))


def _keeps(old: WeightGrid | None, made: QuantPlan, layer: Layer, target: Target) -> bool:
    """Whether a weight may keep its steps, and with them its codes."""
    name = str(layer.node.name)
    new = made.weights[name]
    if old is None or _width(old) != new.bits or (old.axis is not None and new.axis is None):
        return False
    steps = np.asarray(old.scales, np.float32)
    if target.float_bias or layer.bias is None:
        return True
    bias = layer.bias if old.axis is not None else np.abs(layer.bias).max(keepdims=True)
    roomy = room_for_bias(steps, bias, made.tensors[graph.name_of(layer.data)].scale)
    return bool(np.array_equal(roomy, steps))
