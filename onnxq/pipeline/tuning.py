"""Tuning as a stage: block after block, kept if the whole model's outputs get nearer to the float ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from onnxq import graph
from onnxq.emit import emit
from onnxq.graph import Model
from onnxq.pipeline.prepare import rows_are_free
from onnxq.plan import find_blocks
from onnxq.runtime import Session, SessionConfig
from onnxq.tune import ErrorSums, TuneMoments, batches_of, halves, walk
from onnxq.types import Array, Dataset, Feeds, Log, Tuned

ROWS = 128
"""Most calibration rows that moments are measured on; more change little."""
BATCH = 8
QUIET = SessionConfig(stop_spinning=True)


def tune_moments(model: Model, tuned: Tuned, rows: Dataset, seed: int, log: Log) -> Tuned:
    """Match mean and spread of every layer's result to the float model's, if the outputs gain by it.

    Args:
        model: The prepared float model.
        tuned: The plan, and what was learned before.
        rows: Calibration rows.
        seed: Of everything random.
        log: Progress.

    Returns:
        What was found, or `tuned` where it does not help on the rows kept back.
    """
    log.stage("Tuning means and spreads")
    shaped = model.clone()
    graph.infer_shapes(shaped)
    batches = list(batches_of(rows, BATCH, free=rows_are_free(model), limit=ROWS))
    found, _ = walk(model, tuned, find_blocks(shaped), [TuneMoments()], batches, seed=seed, log=log)
    if found is tuned:
        return tuned
    held = [batches[index] for index in halves(len(batches))[1]]
    session = Session(model, QUIET)
    wanted = [session.run(feeds) for feeds in held]
    before, after = (_error(model, state, held, wanted) for state in (tuned, found))
    if after >= before:
        log.note("means and spreads stay as rounding makes them: tuning them does not help this model")
        return tuned
    return found


def _error(model: Model, tuned: Tuned, batches: Sequence[Feeds], wanted: Sequence[Mapping[str, Array]]) -> float:
    """Noise over signal at the model's outputs."""
    session = Session(emit(model, tuned.plan, learned=tuned.layers), QUIET)
    sums = ErrorSums()
    for feeds, outputs in zip(batches, wanted, strict=True):
        sums.add(outputs, session.run(feeds))
    return sums.relative()
