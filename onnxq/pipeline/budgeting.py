"""Bits within budgets, inside `quantize`: what the recipe asks for, checked against the file that will be written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from onnxq import graph
from onnxq.emit import emit
from onnxq.errors import UsageError
from onnxq.graph import Model
from onnxq.pipeline.allocate import OPTIONS, written_bytes
from onnxq.pipeline.calibrated import Calibrated
from onnxq.pipeline.choice import Choice, DropTooLarge
from onnxq.pipeline.mixed import choose_bits
from onnxq.pipeline.overriding import precision_of
from onnxq.pipeline.planning import choose_ranges, plan_of
from onnxq.pipeline.prepare import rows_are_free
from onnxq.pipeline.tuning import Workplace
from onnxq.plan import Placement, Range
from onnxq.plan.budgets import Limit, Wishes
from onnxq.plan.program import Infeasible
from onnxq.recipe import Recipe
from onnxq.tune import batches_of
from onnxq.types import Array, Dataset, Feeds, Log, Observations
from onnxq.types.mixed import BASE, Bits

ROWS, BATCH = 128, 8
"""Most calibration rows that errors are measured on; more change little."""
ATTEMPTS = 4
CLOSE = 0.997
"""A file with this share of the bytes it may have is not worth another attempt."""
"""Times that a file larger than asked for is allocated again."""


@dataclass(frozen=True)
class Allotted:
    """Bits that were chosen.

    Attributes:
        choice: Bits, plan and placement.
        missed: Why the budgets are not met; "" where they are.
    """

    choice: Choice
    missed: str = ""


def calibrated(
    model: Model,
    placement: Placement,
    seen: Observations,
    rows: Dataset,
    settings: Recipe,
    activations: Iterable[int],
    log: Log,
) -> Calibrated:
    """Ranges for 8 bits and for each number of bits in `activations`, and the plans that they allow."""
    ranges: dict[int, Mapping[str, Range]] = {}
    for count in sorted({BASE[1], *activations}, reverse=True):
        alike = replace(settings, activation_bits=count, first_last=count, weight_bits=BASE[0])
        ranges[count] = choose_ranges(model, placement, seen, rows, alike, log)
    whole = replace(settings, weight_bits=BASE[0], activation_bits=BASE[1], first_last=BASE[0])
    plan = plan_of(model, placement, ranges[BASE[1]], rows, whole, log)
    narrow = frozenset(name for name, grid in plan.weights.items() if grid.bits < BASE[0])
    return Calibrated(model, placement, ranges, replace(precision_of(settings, placement), narrow=narrow))


def require_consistent(settings: Recipe) -> None:
    """Refuse bits beside what decides them: a budget, or a codebook, whose codes nothing else may choose.

    Raises:
        UsageError: Weight bits are given with a size, average bits or a latency; a codebook with any budget, with
            weight bits or with a learned method.
    """
    decided = [
        name for name in ("max_size", "avg_bits", "max_latency", "max_bops", "max_cost") if getattr(settings, name)
    ]
    if decided and settings.weight_bits != BASE[0]:
        raise UsageError(f"--{decided[0].replace('_', '-')} decides the bits of every layer: leave --weight-bits out.")
    if settings.codebook_bits and settings.weight_bits != BASE[0]:
        raise UsageError(
            f"--codebook-bits {settings.codebook_bits} and {settings.weight_bits} weight bits are two answers to one "
            "question: take one of them."
        )
    if not settings.codebook_bits and not any(layer.codebook_bits for layer in settings.layers):
        return
    if settings.wishes:
        raise UsageError("budgets choose between uniform grids: leave the codebooks out.")
    if settings.reconstruction != "none":
        raise UsageError(
            f"{settings.reconstruction} learns the codes of uniform grids, not of codebooks: add --reconstruction none "
            "(means and spreads, and biases, can be tuned)."
        )


def options_of(settings: Recipe) -> tuple[Bits, ...]:
    """Bits that layers may get: with a drop alone, those from the recipe's to 8; else all that save bytes."""
    activations = settings.activation_bits
    wishes = settings.wishes
    least = settings.weight_bits if replace(wishes, max_drop=None) == Wishes() else 2
    found = [(weights, activations) for weights, _ in OPTIONS if weights >= least]
    return tuple(dict.fromkeys((BASE, *found)))


@dataclass(frozen=True)
class Ask:
    """What `allot` works on.

    Attributes:
        float_path: The user's file.
        found: The calibrated model.
        settings: Says what is asked for.
        rows: Calibration rows.
        held_out: Rows that judge a drop.
        labelled: Rows with classes that judge it instead.
        macs: Multiply-accumulates per row of the layers.
        provenance: What the file will carry, which counts in its size.
        place: Where what layers lose is measured.
    """

    float_path: Path
    found: Calibrated
    settings: Recipe
    rows: Dataset
    held_out: Dataset
    labelled: Iterable[tuple[Feeds, Array]] | None
    macs: Mapping[str, int]
    provenance: Mapping[str, str]
    place: Workplace = Workplace()


def allot(ask: Ask, *, keep: bool, log: Log) -> Allotted:
    """Bits for every layer within the recipe's budgets.

    Args:
        ask: The model and what is asked for.
        keep: Go on with the nearest that is feasible, instead of refusing.
        log: Progress.

    Raises:
        TargetNotMet: The budgets cannot be met; says what can.
    """
    log.stage("Measuring what each layer loses")
    batches = list(batches_of(ask.rows, BATCH, free=rows_are_free(ask.found.model), limit=ROWS))
    wishes = ask.settings.wishes
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:

        def choose(asked: Wishes, contest: Callable[[Choice], bool] | None = None) -> Choice:
            return _choose(ask, asked, batches, Path(folder), log, contest)

        try:
            return Allotted(_of_size(ask, choose) if wishes.max_size is not None else _best(choose, wishes), "")
        except DropTooLarge as error:
            if not keep:
                raise
            return Allotted(error.best, str(error))
        except Infeasible as error:
            if not keep or error.nearest is None:
                raise
            return Allotted(choose(_relaxed(wishes, error)), str(error))


def _best(
    choose: Callable[..., Choice], wishes: Wishes, fits: Callable[[Choice], bool] = lambda choice: True
) -> Choice:
    """The choice within `wishes`, with rivals where their networks can be compared."""
    contested = wishes.max_drop is None and wishes.max_latency is None
    return choose(wishes, fits) if contested else choose(wishes)


def _of_size(ask: Ask, choose: Callable[..., Choice]) -> Choice:
    """The choice whose file has the size asked for; corrected by what unpacking the weights turns out to take."""
    asked = wishes = ask.settings.wishes
    assert wishes.max_size is not None
    target = wishes.max_size.of(graph.disk_bytes(ask.float_path))
    best, kept, size = None, wishes, 0
    for _ in range(ATTEMPTS):
        refused = None
        try:
            choice = choose(asked)
        except Infeasible as error:
            if best is not None:
                break
            if not size or error.nearest is None:
                raise
            refused, asked = error, _relaxed(asked, error)  # the smallest by the estimate, which may be too high for it
            choice = choose(asked)
        before, size = size, _bytes_of(choice, ask.provenance)
        if refused is not None and size > target:
            least = min(before, size)
            text = f"the size cannot be {target:.0f} bytes: the smallest file that was tried has {least} bytes."
            raise Infeasible(text, refused.name, refused.nearest)
        if size <= target and (best is None or _loss(choice) <= _loss(best)):
            best, kept = choice, asked
        if CLOSE * target <= size <= target:
            break
        assert choice.allocation is not None
        unforeseen = size - choice.allocation.costs["size"]  # nodes and tables that unpack the weights
        asked = replace(asked, max_size=Limit(target - unforeseen, relative=False))
    if best is None:
        return choice
    return _best(choose, kept, lambda rival: _bytes_of(rival, ask.provenance) <= target)


def _loss(choice: Choice) -> float:
    assert choice.allocation is not None
    return choice.allocation.degradation


def _choose(
    ask: Ask,
    wishes: Wishes,
    batches: Sequence[Feeds],
    cache: Path,
    log: Log,
    contest: Callable[[Choice], bool] | None = None,
) -> Choice:
    return choose_bits(
        ask.found,
        wishes,
        ask.float_path,
        batches,
        ask.held_out,
        options=options_of(ask.settings),
        labelled=ask.labelled,
        macs=ask.macs,
        tuned=ask.settings.bn_tuning,
        workers=ask.place.workers,
        backend=ask.place.backend,
        threads=ask.settings.threads,
        cache=cache,
        contest=contest,
        log=log,
    )


def _relaxed(wishes: Wishes, error: Infeasible) -> Wishes:
    """The wish that cannot be met, at the nearest limit that can."""
    assert error.nearest is not None
    nearest = error.nearest * (1 + 1e-6)
    if error.name == "size":
        return replace(wishes, max_size=Limit(nearest, relative=False))
    if error.name == "average weight bits":
        return replace(wishes, avg_bits=nearest)
    if error.name == "bit operations":
        return replace(wishes, max_bops=Limit(nearest, relative=False))
    if error.name == "cost":
        assert wishes.max_cost is not None
        return replace(wishes, max_cost=(wishes.max_cost[0], nearest))
    return replace(wishes, max_latency=Limit(nearest, relative=False))


def _bytes_of(choice: Choice, provenance: Mapping[str, str]) -> int:
    """Size of the file that a choice comes to."""
    return written_bytes(emit(choice.found.model, choice.plan, provenance, packed=True, fused=True))


def describe(choice: Choice) -> Sequence[str]:
    """Sentences for the log about what was chosen."""
    counts: dict[int, int] = {}
    for weights, _ in choice.bits.values():
        counts[weights] = counts.get(weights, 0) + 1
    told = ", ".join(f"{counts[bits]} at {bits}" for bits in sorted(counts, reverse=True))
    found = [f"weight bits by layer: {told}"]
    if choice.kept:
        found.append(f"kept in float: {', '.join(choice.kept)}")
    return found
