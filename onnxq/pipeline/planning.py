"""From the prepared model and the rows to a plan: placement, observation, ranges, grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from onnxq import bench, calibrate, graph, runtime
from onnxq.calibrate import RULES
from onnxq.errors import UnsupportedError, UsageError
from onnxq.graph import Layer, Model
from onnxq.grid import Grid
from onnxq.hints import nearest
from onnxq.overrides import Override, chosen, settle
from onnxq.pipeline.prepare import rows_are_free
from onnxq.plan import Groups, Placement, Precision, Range, activation_bits, make_plan, place
from onnxq.plan.attention import Attention
from onnxq.recipe import Recipe
from onnxq.types import Dataset, Feeds, Log, Observations, QuantPlan, TensorStats

TRIAL_ROWS = 16
"""Rows on which range candidates are compared."""


def observe(model: Model, rows: Dataset, settings: Recipe, log: Log) -> tuple[Placement, Observations]:
    """Placement and statistics; tensors with infinities or NaN are taken out of the placement."""
    keep = _kept(model, settings)
    attention = Attention(settings.attention_bits, settings.softmax)
    placement = place(model, keep_float=keep, attention=attention)
    if not placement.layers:
        reasons = sorted({f"{name}: {reason}" for name, reason in placement.skipped.items()})[:3]
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise UnsupportedError(f"nothing in this model can run in integers{why}.")
    log.stage("Calibrating")
    observations = calibrate.observe(
        model, rows, placement.tensors, bench.matrix_tensors(model), seed=settings.seed, progress=log.advance
    )
    broken = {
        name: f"its tensor {name} holds infinities or NaN"
        for name, stats in observations.tensors.items()
        if not stats.finite
    }
    if broken:
        log.warn(f"{len(broken)} tensors hold infinities or NaN on the calibration data and stay in float")
        placement = place(model, keep_float=keep, refuse=broken, attention=attention)
    _warn_of_idle(model, placement, settings, log)
    return placement, observations


def _operators(model: Model) -> dict[str, str]:
    return {name: str(node.op_type) for name, node in graph.node_names(model).items()}


def _warn_of_idle(model: Model, placement: Placement, settings: Recipe, log: Log) -> None:
    """Say which overrides change nothing, as what they choose is not there or does not run in integers."""
    nodes = _operators(model)
    integer = {unit.name: nodes[unit.name] for unit in placement.layers}
    for override in settings.layers:
        if not chosen(override, nodes):
            log.warn(f"{override} matches no node of the simplified model{_near(override.match or '', nodes)}")
        elif not override.keep_float and not chosen(override, integer):
            log.warn(f"{override} matches no layer that runs in integers.")


def _kept(model: Model, settings: Recipe) -> list[str]:
    """Names of the nodes that the recipe keeps in float."""
    nodes = _operators(model)
    found = [name for name, override in settle(settings.layers, nodes).items() if override.keep_float]
    for pattern in settings.keep_float:
        matched = chosen(Override(pattern, keep_float=True), nodes)
        if not matched:
            near = _near(pattern, nodes)
            raise UsageError(f"keep-float pattern {pattern!r} matches no node of the simplified model{near}")
        found += matched
    return found


def _near(pattern: str, nodes: Mapping[str, str]) -> str:
    near = nearest(pattern, nodes)
    return f". Did you mean {' or '.join(map(repr, near))}?" if near else "."


def _own(placement: Placement, settings: Recipe) -> dict[str, Override]:
    """What the recipe says of single integer layers, by name."""
    return settle(settings.layers, {unit.name: str(unit.node.op_type) for unit in placement.layers})


def choose_ranges(
    model: Model, placement: Placement, seen: Observations, rows: Dataset, settings: Recipe, log: Log
) -> dict[str, Range]:
    """A range for every tensor of the placement, by one rule or by what hurts the layers behind it least."""
    stats = {name: seen.tensors[name] for name in placement.tensors}
    seen_ranges = {name: Range(found.low, found.high, "minmax") for name, found in stats.items()}
    bits = activation_bits(placement, Groups(placement, seen_ranges), precision_of(settings, placement))
    grids = {name: Grid(count, signed=False, symmetric=False) for name, count in bits.items()}
    given = _given_ranges(placement, settings, stats, grids)
    if settings.ranges != "auto":
        rule = RULES[settings.ranges]
        return {name: Range(*rule(found, grids[name]), settings.ranges) for name, found in stats.items()} | given
    log.stage("Choosing ranges")
    readers = _readers(placement)
    chosen = calibrate.choose(
        model,
        replace(seen, tensors=stats),
        readers,
        some_rows(rows, TRIAL_ROWS, model),
        grids,
        progress=log.advance,
    )
    return {name: Range(*found, judged=name in readers) for name, found in chosen.items()} | given


def _given_ranges(
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


def _readers(placement: Placement) -> dict[str, list[Layer]]:
    readers: dict[str, list[Layer]] = {}
    for unit in placement.layers:
        if unit.layer is not None:
            readers.setdefault(graph.name_of(unit.layer.data), []).append(unit.layer)
    return readers


def some_rows(rows: Dataset, count: int, model: Model) -> list[Feeds]:
    """The first `count` rows in small batches (whole batches where the model fixes their size)."""
    free = rows_are_free(model)
    found: list[Feeds] = []
    taken = 0
    for feeds in rows:
        size = len(next(iter(feeds.values())))
        room = count - taken
        step = 4 if free else size
        for start in range(0, min(size, room) if free else size, step):
            stop = min(start + step, room) if free else size
            found.append({name: value[start:stop] for name, value in feeds.items()} if free else feeds)
        taken += size
        if taken >= count:
            break
    return found


def plan_of(
    model: Model,
    placement: Placement,
    ranges: Mapping[str, Range],
    rows: Dataset,
    settings: Recipe,
    log: Log,
) -> QuantPlan:
    """The grids; layers that would saturate where they must not get 7-bit weights."""
    precision = precision_of(settings, placement)
    plan = make_plan(model, placement, ranges, precision, target="cpu")
    if not (settings.portable or (settings.target == "auto" and runtime.saturates())):
        return plan
    log.stage("Looking for 16-bit saturation")
    layers = {unit.name: unit.layer for unit in placement.layers if unit.layer is not None}
    few = some_rows(rows, 8, model)
    narrow = calibrate.saturating(model, layers, plan.tensors, plan.weights, few, seed=settings.seed)
    if not narrow:
        return plan
    log.note(f"{len(narrow)} layers get 7-bit weights: without VNNI their sums would saturate")
    return make_plan(model, placement, ranges, replace(precision, narrow=frozenset(narrow)), target="cpu")


def precision_of(settings: Recipe, placement: Placement) -> Precision:
    """Bit widths and granularity that a recipe asks for, those of single layers among them."""
    uniform = Precision(
        weight_bits=settings.weight_bits,
        activation_bits=settings.activation_bits,
        per_channel=settings.per_channel,
        first_last=settings.first_last,
        residual_bits=settings.residual_bits,
    )
    own, names = _own(placement, settings), [unit.name for unit in placement.layers]
    bits = {}
    for name, override in own.items():
        weights, activations = uniform.bits_of(name, ends=name in (names[0], names[-1]))
        if override.has_bits:
            bits[name] = (override.weight_bits or weights, override.activation_bits or activations)
    granularity = {name: found.per_channel for name, found in own.items() if found.per_channel is not None}
    return replace(uniform, layers=bits, granularity=granularity)
