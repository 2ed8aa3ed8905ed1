"""`sensitivity`: what every layer of a float file costs the outputs at fewer bits, and what that buys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from onnxq import calibrate, graph, passes
from onnxq.calibrate import Preprocess
from onnxq.jobs import require_backend
from onnxq.pipeline.allocate import errors_of, sizes
from onnxq.pipeline.budgeting import calibrated
from onnxq.pipeline.planning import observe
from onnxq.pipeline.prepare import load_float, model_inputs, prepare, probe_of, rows_are_free
from onnxq.pipeline.sensitivity import additivity, remeasured, sensitivities
from onnxq.plan.program import front
from onnxq.recipe import Recipe
from onnxq.tune import batches_of
from onnxq.types import Feeds, Log, Silence
from onnxq.types.mixed import BASE, Bits, Study

ROWS, BATCH = 128, 8
"""Calibration rows that errors are measured on; more change little."""
POINTS = 12


def sensitivity(
    model: str | Path,
    data: Any,
    options: Sequence[Bits] = ((4, 8), (3, 8), (2, 8)),
    *,
    preprocess: Preprocess | None = None,
    samples: int = 512,
    batch: int | None = None,
    rows: int = ROWS,
    points: int = POINTS,
    check: bool = False,
    workers: int = 0,
    backend: str = "local",
    cache: Path | None = None,
    log: Log = Silence(),
) -> Study:
    """Measure what every layer of a float file adds at fewer bits, and find the front of size against degradation.

    Args:
        model: Path of the float model.
        data: Calibration rows, as for `quantize`; no labels are needed.
        options: (weight bits, activation bits) to try besides 8/8.
        preprocess: What is done to images.
        samples: Most calibration rows.
        batch: Rows per run during calibration.
        rows: Most of them that errors are measured on.
        points: Points of the front, about.
        check: Measure the network of every point, too.
        workers: Processes; 0 for one per core.
        backend: Where they are, see `onnxq.jobs.open_backend`.
        cache: Folder that keeps results from run to run.
        log: Progress.

    Raises:
        InputError: The model or the data cannot be read or does not fit.
        UnsupportedError: Nothing in the model can be quantized.
        UsageError: No such backend.
        EnvironmentFault: It cannot be reached.
    """
    require_backend(backend)
    log.stage("Reading the model")
    loaded = load_float(model)
    dataset = calibrate.open_data(data, model_inputs(loaded), preprocess=preprocess, samples=samples, batch=batch)
    fit, _ = calibrate.split(dataset)
    fixed = not rows_are_free(loaded)
    rewrites = passes.rewrites(equalize=False, without=())
    prepared = prepare(model, loaded, lambda: probe_of(dataset, fixed), log, rewrites)
    tried = list(dict.fromkeys((BASE, *options)))
    settings = Recipe()
    placement, observations = observe(prepared.model, fit, settings, log)
    activations = [bits for _, bits in tried]
    found = calibrated(prepared.model, placement, observations, fit, settings, activations, log)
    batches: list[Feeds] = list(batches_of(fit, BATCH, free=rows_are_free(prepared.model), limit=rows))
    known = sensitivities(found, tried, batches, workers=workers, backend=backend, cache=cache, log=log)
    chosen = front(errors_of(known), sizes(found, known), points=points)
    if check:
        chosen = remeasured(found, known, chosen, batches, log=log)
    path = graph.require_readable(model)
    return Study(str(model), graph.disk_bytes(path), known, chosen, additivity(chosen) if check else None)
