"""From the prepared model and the rows to a plan: placement, observation, ranges, grids."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from onnxq import bench, calibrate, graph, runtime
from onnxq.calibrate import RULES
from onnxq.calibrate.observe import count_rows
from onnxq.calibrate.saturation import Saturation
from onnxq.errors import UnsupportedError
from onnxq.graph import Layer, Model
from onnxq.pipeline.overriding import given_ranges, kept_names, precision_of, warn_of_idle
from onnxq.pipeline.prepare import rows_are_free
from onnxq.plan import Groups, Placement, Range, activation_bits, activation_grid, make_plan, place
from onnxq.plan.attention import Attention
from onnxq.recipe import Recipe
from onnxq.types import Dataset, Feeds, Log, Observations, QuantPlan
from onnxq.types.target import target_of

SUFFERS_DB = 45.0
"""Saturation noise this far below a layer's result is less than what 7-bit weights add to it."""
TRIAL_ROWS = 16
"""Rows on which range candidates are compared."""


def observe(
    model: Model, rows: Dataset, settings: Recipe, log: Log, without: Collection[str] = ()
) -> tuple[Placement, Observations]:
    """Placement and statistics; tensors with infinities or NaN are taken out of the placement, and nodes `without`."""
    floats = dict.fromkeys(without, "")
    placement = placed(model, settings, floats=floats)
    if not placement.layers and not without:
        reasons = sorted({f"{name}: {reason}" for name, reason in placement.skipped.items()})[:3]
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise UnsupportedError(f"nothing in this model can run in integers{why}.")
    log.stage("Calibrating")
    observations = calibrate.observe(
        model, rows, placement.tensors, bench.matrix_tensors(model), seed=settings.seed, progress=log.advance
    )
    broken = sum(not stats.finite for stats in observations.tensors.values())
    if broken:
        log.warn(f"{broken} tensors hold infinities or NaN on the calibration data and stay in float")
        placement = placed(model, settings, observations, floats)
    warn_of_idle(model, placement, settings, log)
    return placement, observations


def placed(
    model: Model, settings: Recipe, seen: Observations | None = None, floats: Mapping[str, str] | None = None
) -> Placement:
    """What the rules and the recipe say about where nodes run.

    Args:
        model: The prepared float model.
        settings: Nodes to keep in float, the target, and how attention is quantized.
        seen: Statistics; tensors without finite ones are refused.
        floats: More nodes to keep in float -> why; "" for the rules' own words.
    """
    refuse = {}
    if seen is not None:
        broken = [name for name, stats in seen.tensors.items() if not stats.finite]
        refuse = {name: f"its tensor {name} holds infinities or NaN" for name in broken}
    kept = [*kept_names(model, settings), *(floats or {})]
    attention, target = Attention(settings.attention_bits, settings.softmax), target_of(settings.target)
    found = place(model, keep_float=kept, refuse=refuse, attention=attention, target=target)
    unseen = [name for name in found.tensors if seen is not None and name not in seen.tensors]
    if unseen:
        refuse |= dict.fromkeys(unseen, "no range was observed")
        found = place(model, keep_float=kept, refuse=refuse, attention=attention, target=target)
    why = {name: reason for name, reason in (floats or {}).items() if reason and name in found.skipped}
    return replace(found, skipped={**found.skipped, **why})


def choose_ranges(
    model: Model, placement: Placement, seen: Observations, rows: Dataset, settings: Recipe, log: Log
) -> dict[str, Range]:
    """A range for every tensor of the placement, by one rule or by what hurts the layers behind it least."""
    stats = {name: seen.tensors[name] for name in placement.tensors}
    seen_ranges = {name: Range(found.low, found.high, "minmax") for name, found in stats.items()}
    bits = activation_bits(placement, Groups(placement, seen_ranges), precision_of(settings, placement))
    grids = {name: activation_grid(placement.target, count) for name, count in bits.items()}
    given = given_ranges(placement, settings, stats, grids)
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
        size = count_rows(feeds)
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
    plan = make_plan(model, placement, ranges, precision)
    asked = settings.portable or (settings.target == "auto" and runtime.saturates())
    if not (asked and placement.target.on_cpu):
        return plan
    log.stage("Looking for 16-bit saturation")
    layers = {unit.name: unit.layer for unit in placement.layers if unit.layer is not None}
    few = some_rows(rows, 8, model)
    found = calibrate.saturating(model, layers, plan.tensors, plan.weights, few, seed=settings.seed)
    narrow = frozenset(name for name, saturation in found.items() if saturation.sqnr_db < SUFFERS_DB)
    log.note(_saturation_note(found, len(narrow)))
    return make_plan(model, placement, ranges, replace(precision, narrow=narrow)) if narrow else plan


def _saturation_note(found: Mapping[str, Saturation], narrow: int) -> str:
    """What would happen on processors that saturate, and what is done about it."""
    safe = "ARM and x86 with VNNI do not saturate"
    if not found:
        return f"no layer's 16-bit sums would saturate on x86 without VNNI; {safe}"
    worst = min(found, key=lambda name: found[name].sqnr_db)
    return (
        f"on x86 without VNNI, 16-bit sums would saturate in {len(found)} layers, worst in {worst}: "
        f"{found[worst].sqnr_db:.0f} dB; {narrow} layers below {SUFFERS_DB:.0f} dB get 7-bit weights; {safe}"
    )
