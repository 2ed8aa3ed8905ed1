"""From wishes to bits: the one call that `quantize` needs for mixed precision."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onnxq import graph
from onnxq.pipeline.allocate import OPTIONS, allocate, budgets_of, drop_meter, within_drop
from onnxq.pipeline.calibrated import Calibrated
from onnxq.pipeline.choice import Choice
from onnxq.pipeline.contest import contested
from onnxq.pipeline.prepare import rows_are_free
from onnxq.pipeline.sensitivity import sensitivities
from onnxq.pipeline.timing import latency_costs
from onnxq.plan.budgets import Wishes
from onnxq.runtime import Session
from onnxq.types import Array, Feeds, Log, Silence
from onnxq.types.mixed import BASE, FLOAT, Bits


def choose_bits(
    found: Calibrated,
    wishes: Wishes,
    float_path: Path,
    batches: Sequence[Feeds],
    held_out: Iterable[Feeds],
    *,
    options: Sequence[Bits] = OPTIONS,
    labelled: Iterable[tuple[Feeds, Array]] | None = None,
    macs: Mapping[str, int] | None = None,
    tuned: bool = True,
    workers: int = 0,
    backend: str = "local",
    threads: int = 1,
    cache: Path | None = None,
    contest: Callable[[Choice], bool] | None = None,
    log: Log = Silence(),
) -> Choice:
    """Bits for every layer that meet `wishes`.

    Args:
        found: The calibrated model, with ranges for all activation bits of `options`.
        wishes: What was asked for.
        float_path: The user's file: its size and outputs are the reference.
        batches: Calibration rows in small batches.
        held_out: Rows that calibration did not see, for `max_drop`; any number of passes.
        options: Bits that layers may get. With 8/8 alone and a drop, layers have 8 bits or stay in float.
        labelled: Held-out rows with class indices, if there are any.
        macs: Multiply-accumulates per row of the layers, for `max_bops`.
        tuned: The final network gets its moments matched.
        workers: Processes; 0 for one per core.
        backend: Where they are, see `onnxq.jobs.open_backend`.
        threads: Intra-op threads that latency is measured with.
        cache: Folder that keeps sensitivities from run to run.
        contest: Measure rivals of the program's choice, too, those for which this is true (`contested`).
        log: Progress.

    Raises:
        Infeasible: The budgets cannot be met; says what can.
        TargetNotMet: They can, but not together with the drop.
        UsageError: There are no ranges for some activation bits.
    """
    timed = wishes.max_latency is not None
    tried = list(dict.fromkeys((BASE, *options, *([FLOAT] if timed else []))))
    budgets, known = [], None
    if tried != [BASE] or wishes.max_drop is None:
        known = sensitivities(
            found, tried, batches, tuned=tuned, workers=workers, backend=backend, cache=cache, log=log
        )
        one = {name: value[:1] for name, value in batches[0].items()} if rows_are_free(found.model) else batches[0]
        latency, float_ms = latency_costs(found, tried, one, threads=threads) if timed else (None, 0.0)
        size = graph.disk_bytes(float_path)
        budgets = budgets_of(found, known, wishes, float_bytes=size, latency=latency, float_ms=float_ms, macs=macs)
    if wishes.max_drop is not None:
        drop = drop_meter(Session(float_path), held_out, labelled)
        return replace(within_drop(found, known, budgets, wishes.max_drop, drop, batches, log=log), known=known)
    assert known is not None
    if contest is not None:
        return replace(contested(found, known, budgets, batches, contest, log=log), known=known)
    return replace(allocate(found, known, budgets), known=known)
