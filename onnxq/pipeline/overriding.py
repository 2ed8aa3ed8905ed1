"""What a recipe says of single nodes and layers: which stay in float, their bits, ranges and granularity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from onnxq import graph
from onnxq.calibrate import RULES
from onnxq.errors import UsageError
from onnxq.graph import Model
from onnxq.grid import Grid
from onnxq.hints import nearest
from onnxq.overrides import Override, chosen, settle
from onnxq.passes.split_identity import PARTS
from onnxq.plan import Placement, Precision, Range
from onnxq.recipe import Recipe
from onnxq.types import Log, TensorStats


def kept_names(model: Model, settings: Recipe) -> list[str]:
    """Names of the nodes that the recipe keeps in float.

    Raises:
        UsageError: A pattern of `keep_float` matches none.
    """
    nodes = _operators(model)
    found = [name for name, override in settle(settings.layers, nodes).items() if override.keep_float]
    for pattern in settings.keep_float:
        matched = chosen(Override(pattern, keep_float=True), nodes)
        if not matched:
            near = _near(pattern, nodes)
            raise UsageError(f"keep-float pattern {pattern!r} matches no node of the simplified model{near}")
        found += matched
    return found + [f"{name}{part}" for name in found for part in PARTS if f"{name}{part}" in nodes]


def warn_of_idle(model: Model, placement: Placement, settings: Recipe, log: Log) -> None:
    """Say which overrides change nothing, as what they choose is not there or does not run in integers."""
    nodes = _operators(model)
    integer = {unit.name: nodes[unit.name] for unit in placement.layers}
    for override in settings.layers:
        if not chosen(override, nodes):
            log.warn(f"{override} matches no node of the simplified model{_near(override.match or '', nodes)}")
        elif not override.keep_float and not chosen(override, integer):
            log.warn(f"{override} matches no layer that runs in integers.")


def given_ranges(
    placement: Placement, settings: Recipe, stats: Mapping[str, TensorStats], grids: Mapping[str, Grid]
) -> dict[str, Range]:
    """Ranges of the tensors that single layers have a rule for."""
    own, found = _own(placement, settings), {}
    for unit in placement.layers:
        rule = own[unit.name].ranges if unit.name in own else None
        if rule is not None:
            name = graph.name_of(unit.inputs[0])
            found[name] = Range(*RULES[rule](stats[name], grids[name]), rule)
    return found


def precision_of(settings: Recipe, placement: Placement) -> Precision:
    """Bit widths and granularity that a recipe asks for, those of single layers among them."""
    uniform = Precision(
        weight_bits=settings.weight_bits,
        activation_bits=settings.activation_bits,
        per_channel=settings.per_channel,
        first_last=settings.first_last,
        residual_bits=settings.residual_bits,
        codebook_bits=settings.codebook_bits,
    )
    own, names = _own(placement, settings), [unit.name for unit in placement.layers]
    bits = {}
    for name, override in own.items():
        weights, activations = uniform.bits_of(name, ends=name in (names[0], names[-1]))
        if override.has_bits:
            bits[name] = (override.weight_bits or weights, override.activation_bits or activations)
    books = {name: found.codebook_bits or 0 for name, found in own.items() if found.codebook_bits or found.weight_bits}
    granularity = {name: found.per_channel for name, found in own.items() if found.per_channel is not None}
    return replace(uniform, layers=bits, granularity=granularity, codebooks=books)


def _operators(model: Model) -> dict[str, str]:
    return {name: str(node.op_type) for name, node in graph.node_names(model).items()}


def _near(pattern: str, nodes: Mapping[str, str]) -> str:
    near = nearest(pattern, nodes)
    return f". Did you mean {' or '.join(map(repr, near))}?" if near else "."


def _own(placement: Placement, settings: Recipe) -> dict[str, Override]:
    """What the recipe says of single integer layers, by name."""
    return settle(settings.layers, {unit.name: str(unit.node.op_type) for unit in placement.layers})
