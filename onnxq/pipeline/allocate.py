"""Bits for every layer, from what users ask for: a size, average bits, a latency, a drop of the metric."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onnxq import bench, graph
from onnxq.emit import emit, stored_bytes
from onnxq.errors import DataError
from onnxq.graph import Model
from onnxq.pipeline.calibrated import Calibrated
from onnxq.pipeline.choice import Choice, DropTooLarge
from onnxq.plan import find_blocks
from onnxq.plan.budgets import Wishes
from onnxq.plan.costs import average_bits, bit_operations, read_costs, size_costs
from onnxq.plan.program import front, solve
from onnxq.runtime import Session, SessionConfig
from onnxq.tune import TuneMoments, walk
from onnxq.tune.sensitivity import output_error
from onnxq.types import Array, Feeds, Log, Silence, Tuned
from onnxq.types.mixed import BASE, FLOAT, Bits, Budget, Costs, Sensitivities

OPTIONS: tuple[Bits, ...] = (BASE, (6, 8), (5, 8), (4, 8), (3, 8), (2, 8))
"""What layers may get unless something else is said: 7 bits save no bytes, fewer bits of activations no time."""
POINTS = 24
"""Points of the front that are searched for the smallest network within a drop."""
QUIET = SessionConfig(stop_spinning=True)


def errors_of(known: Sensitivities) -> dict[str, dict[Bits, float]]:
    """Group -> bits -> error added at the model's outputs."""
    return {group: {bits: entry.output for bits, entry in errors.items()} for group, errors in known.added.items()}


def options_of(known: Sensitivities) -> list[Bits]:
    """All bits that some group was measured at."""
    return list(dict.fromkeys(bits for errors in known.added.values() for bits in errors))


def base_bytes(found: Calibrated) -> int:
    """Bytes of the file with all layers at 8 bits."""
    return written_bytes(emit(found.model, found.base, packed=True, fused=True))


def written_bytes(model: Model) -> int:
    """Bytes of a model's file, external weights included."""
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        path = Path(folder) / "model.onnx"
        graph.save(model, path)
        return graph.disk_bytes(path)


def sizes(found: Calibrated, known: Sensitivities) -> Costs:
    """Bytes of the file by group."""
    per_channel = found.precision.per_channel
    costs = size_costs(found.placement, options_of(known), base_bytes(found), stored_bytes, per_channel=per_channel)
    return costs.grouped(found.groups)


def budgets_of(
    found: Calibrated,
    known: Sensitivities,
    wishes: Wishes,
    *,
    float_bytes: int,
    latency: Costs | None = None,
    float_ms: float = 0.0,
    macs: Mapping[str, int] | None = None,
) -> list[Budget]:
    """The budgets of `solve` that some wishes come to.

    Args:
        found: The calibrated model.
        known: Its sensitivities.
        wishes: What was asked for; `max_drop` is not a budget.
        float_bytes: Size of the float file.
        latency: Milliseconds by layer (`onnxq.plan.timing.latency_costs`); needed for `max_latency`.
        float_ms: Latency of the float model.
        macs: Multiply-accumulates per row of the layers; needed for `max_bops`.
    """
    budgets = []
    if wishes.max_size is not None:
        budgets.append(Budget(sizes(found, known), wishes.max_size.of(float_bytes)))
    if wishes.avg_bits is not None:
        costs = average_bits(found.placement, options_of(known)).grouped(found.groups)
        budgets.append(Budget(costs, wishes.avg_bits))
    if wishes.max_latency is not None:
        assert latency is not None
        budgets.append(Budget(latency.grouped(found.groups), wishes.max_latency.of(float_ms)))
    if wishes.max_bops is not None:
        assert macs is not None
        work = bit_operations(macs, found.placement, options_of(known)).grouped(found.groups)
        budgets.append(Budget(work, wishes.max_bops.of(work.total(dict.fromkeys(found.groups, BASE)))))
    if wishes.max_cost is not None:
        path, limit = wishes.max_cost
        budgets.append(Budget(read_costs(path).grouped(found.groups), limit))
    return budgets


def allocate(found: Calibrated, known: Sensitivities, budgets: Sequence[Budget]) -> Choice:
    """The bits that degrade the model least within all budgets.

    Raises:
        Infeasible: The budgets cannot be met; says what can.
    """
    allocation = solve(errors_of(known), budgets)
    bits = found.by_layer(allocation.bits)
    floats = [layer for layer, chosen in bits.items() if chosen == FLOAT]
    kept = found.keeping_float(floats) if floats else found
    return Choice(kept, {layer: chosen for layer, chosen in bits.items() if chosen != FLOAT}, allocation)


Drop = Callable[[Model], float]
"""What share of the metric a quantized model loses."""


def drop_meter(
    reference: Session, batches: Iterable[Feeds], labelled: Iterable[tuple[Feeds, Array]] | None = None
) -> Drop:
    """How much a quantized model loses.

    Args:
        reference: The float model.
        batches: Rows that calibration did not see; any number of passes.
        labelled: The same with class indices.

    Returns:
        A function of the quantized model: with labels the difference of top-1, without the share of rows whose
        arg-max changes; noise power over signal power where no output looks like class scores.
    """

    def drop(model: Model) -> float:
        candidate = Session(model, QUIET)
        if labelled is not None:
            return bench.top1(reference, labelled).accuracy.value - bench.top1(candidate, labelled).accuracy.value
        found = bench.compare(reference, candidate, batches)
        if found.agreement is not None:
            return 1.0 - found.agreement.value
        if not found.sqnr_db:
            raise DataError("a drop cannot be measured: the shapes of all outputs depend on what the model finds.")
        return max(10 ** (-decibels / 10) for decibels in found.sqnr_db.values())

    return drop


def built(choice: Choice, batches: Sequence[Feeds]) -> Model:
    """The network of a choice, its moments matched on `batches`."""
    shaped = choice.found.model.clone()
    graph.infer_shapes(shaped)
    state, _ = walk(choice.found.model, Tuned(choice.plan), find_blocks(shaped), [TuneMoments()], batches)
    return emit(choice.found.model, state.plan, learned=state.layers)


def within_drop(
    found: Calibrated,
    known: Sensitivities | None,
    budgets: Sequence[Budget],
    limit: float,
    drop: Drop,
    batches: Sequence[Feeds],
    *,
    log: Log = Silence(),
) -> Choice:
    """Bits whose network loses `limit` at most, measured.

    With budgets, what they allow must keep the limit. Without, the smallest file is looked for, by bisection over the
    Pareto front of size and predicted degradation; without sensitivities, 8 bits are all that is tried. Where
    8 bits lose too much, the most harmful layers stay in float, as few as bisection over their ranking finds.

    Args:
        found: The calibrated model.
        known: Its sensitivities; None for 8 bits only.
        budgets: Other limits.
        limit: Most share of the metric that may be lost.
        drop: Measures it (`drop_meter`).
        batches: Calibration rows, for the moments and the ranking.
        log: Progress.

    Raises:
        Infeasible: The budgets cannot be met.
        TargetNotMet: They can, but not together with the limit.
    """
    log.stage("Measuring the drop")

    def tried(choice: Choice) -> Choice:
        lost = drop(built(choice, batches))
        log.step(f"{len(choice.kept)} layers in float, drop {lost:.4f}")
        return replace(choice, drop=lost)

    if budgets and known is not None:
        choice = tried(allocate(found, known, budgets))
        if choice.drop is not None and choice.drop > limit:
            raise DropTooLarge(
                f"within the other budgets the drop cannot be kept below {limit:g}: it is {choice.drop:.4g}. "
                "Allow more of either.",
                choice,
            )
        return choice
    base = tried(Choice(found, dict.fromkeys(found.by_layer(dict.fromkeys(found.groups, BASE)), BASE)))
    if base.drop is not None and base.drop > limit:
        return _guarded(found, base, limit, tried, batches, log)
    if known is None:
        return base
    points = front(errors_of(known), sizes(found, known), points=POINTS)
    choices = [base, *(Choice(found, found.by_layer(point.bits), point) for point in points)]
    return _last_within(choices, tried, limit)


def _last_within(choices: Sequence[Choice], tried: Callable[[Choice], Choice], limit: float) -> Choice:
    """The last of `choices` that keeps the limit, if all before it do; the first is known to."""
    low, high, best = 0, len(choices), choices[0]
    while high - low > 1:
        middle = (low + high) // 2
        choice = tried(choices[middle])
        if choice.drop is not None and choice.drop <= limit:
            low, best = middle, choice
        else:
            high = middle
    return best


def _guarded(
    found: Calibrated,
    base: Choice,
    limit: float,
    tried: Callable[[Choice], Choice],
    batches: Sequence[Feeds],
    log: Log,
) -> Choice:
    """8 bits with the fewest of the most harmful layers in float."""
    harm = harms(found, batches)
    ranking = sorted(harm, key=lambda layer: -harm[layer])

    def keeping(count: int) -> Choice:
        kept = tuple(ranking[:count])
        return Choice(found.keeping_float(kept), {n: b for n, b in base.bits.items() if n not in kept}, None, kept)

    low, high, best = 0, len(ranking), None
    while high - low > 1:
        middle = (low + high) // 2
        choice = tried(keeping(middle))
        if choice.drop is not None and choice.drop <= limit:
            high, best = middle, choice
        else:
            low = middle
    if best is None:
        raise DropTooLarge(
            f"a drop of {limit:g} cannot be kept with any layer in integers: it is {base.drop:.4g} at 8 bits. "
            "Allow more, or give more calibration rows.",
            base,
        )
    log.note(f"{len(best.kept)} of {len(ranking)} layers stay in float to keep the drop below {limit:g}")
    return best


def harms(found: Calibrated, batches: Sequence[Feeds]) -> dict[str, float]:
    """Error at the outputs of the float model with only this layer, its input and its result at 8 bits, by layer."""
    session = Session(found.model, QUIET)
    wanted = [session.run(feeds) for feeds in batches]
    base, harm = found.base, {}
    for unit in found.placement.layers:
        near = {graph.name_of(value) for value in (*unit.inputs, *unit.outputs)}
        alone = replace(
            base,
            tensors={name: grid for name, grid in base.tensors.items() if name in near},
            weights={unit.name: base.weights[unit.name]},
            integer=(unit.name,),
            guards=(),
            sums=(),
            constants={},
            tables=(),
        )
        harm[unit.name] = output_error(emit(found.model, alone), batches, wanted, simulate=True)
    return harm
