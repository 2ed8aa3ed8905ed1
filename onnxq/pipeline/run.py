"""`quantize`: load, prepare, place, observe, choose ranges, plan, emit, verify."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from onnxq import bench, calibrate, graph, passes, runtime
from onnxq.calibrate import LabelledDataset, Preprocess
from onnxq.emit import emit
from onnxq.errors import UnsupportedError
from onnxq.graph import Model
from onnxq.pipeline.allocate import written_bytes
from onnxq.pipeline.budgeting import Ask, allot, calibrated, describe, require_consistent
from onnxq.pipeline.details import details
from onnxq.pipeline.migration import migrate_norms
from onnxq.pipeline.planning import choose_ranges, observe, plan_of
from onnxq.pipeline.prepare import Prepared, load_float, model_inputs, prepare, probe_of
from onnxq.pipeline.tuning import Workplace, keeps_progress, require_learning, require_place, tune
from onnxq.pipeline.verify import verify
from onnxq.plan import Placement, save_learned, save_plan
from onnxq.recipe import Recipe, resolve
from onnxq.types import BlockResult, Dataset, LearnedLayer, Log, Observations, QuantPlan, Silence, Tuned, Verdict
from onnxq.types.details import Details
from onnxq.version import __version__

SLACK = 1.02
"""A latency that is this much above the limit is taken to meet it: repeated measurements differ by as much."""


@dataclass(frozen=True)
class Checks:
    """What is measured about a result.

    Attributes:
        verify: Compare it with the float model.
        time_it: Measure latency while verifying.
        explain: Measure every layer, for the report.
    """

    verify: bool = True
    time_it: bool = True
    explain: bool = False


@dataclass(frozen=True)
class QuantizedModel:
    """The result of `quantize`.

    Attributes:
        model: The QDQ graph.
        plan: The grids and the placement behind it.
        prepared: The float graph it was made from.
        recipe: The resolved recipe.
        data: Where the calibration rows came from.
        rows: How many of them calibrated the ranges.
        verdict: What verification found; None for a dry run.
        learned: Codes and biases that replace plain rounding, by node name.
        blocks: What learning did to each block.
        missed: Why the budgets are not met; "" where they are.
        details: Every layer measured, for the report; None where that was not asked for.
        progress: Folder that holds what this run learned block by block; None where it kept none.
    """

    model: Model
    plan: QuantPlan
    prepared: Prepared
    recipe: Recipe
    data: Mapping[str, object]
    rows: int
    verdict: Verdict | None
    learned: Mapping[str, LearnedLayer]
    blocks: tuple[BlockResult, ...] = ()
    missed: str = ""
    details: Details | None = None
    progress: Path | None = None

    @property
    def simulated(self) -> bool:
        """Whether some grid has no kernel and is emulated at the cost of speed."""
        return self.plan.simulated

    def save(self, path: str | Path) -> Path:
        """Write the ONNX file, whole or not at all; returns its path."""
        target = Path(path)
        graph.save(self.model, target)
        return target

    def save_plan(self, path: str | Path) -> None:
        """Write the plan as JSON; learned codes and biases go beside it, into a file ending in .npz."""
        save_plan(self.plan, Path(path))
        if self.learned:
            save_learned(self.learned, Path(path).with_suffix(".npz"))


def quantize(
    model: str | Path,
    data: Any,
    recipe: Recipe | str | Path | None = None,
    *,
    preprocess: Preprocess | None = None,
    batch: int | None = None,
    checks: Checks = Checks(),
    place: Workplace = Workplace(),
    labelled: Any = None,
    keep: bool = False,
    log: Log = Silence(),
    **changes: Any,
) -> QuantizedModel:
    """Quantize a float ONNX file to int8 QDQ.

    Args:
        model: Path of the float model.
        data: Calibration rows: a folder of images, .npz or .npy files, one such file, "module:callable", arrays by
            input name, or an iterable of feeds. See docs/data.md.
        recipe: A preset's name, a TOML file or a `Recipe`.
        preprocess: What is done to images.
        batch: Rows per run during calibration.
        checks: What is measured about the result.
        place: Where learning computes, and the folder that keeps what it found.
        labelled: Rows with classes that judge `max_drop`; without, the share of changed arg-maxes on rows that
            calibration did not see does.
        keep: Return the nearest to the budgets where they cannot be met; `missed` then says so.
        log: Progress.
        **changes: Fields of `Recipe` that replace the recipe's.

    Returns:
        The quantized model with its plan and verdict; `save` writes it.

    Raises:
        InputError: The model or the data cannot be read or does not fit.
        UnsupportedError: Nothing in the model can be quantized.
        UsageError: The recipe contradicts itself, or the state in `place.progress` is another run's.
        TargetNotMet: The budgets cannot be met; the message says what can.
        EnvironmentFault: The recipe learns, and PyTorch or the device is missing; or the backend cannot be reached.
    """
    settings = resolve(recipe, **changes)
    require_place(settings, place)
    require_learning(settings, place)
    require_consistent(settings)
    log.stage("Reading the model")
    loaded = load_float(model)
    _require_layers(loaded, Path(model))
    work = _work(Path(model), loaded, Data(data, labelled, preprocess, batch), settings, log)
    return _quantized(work, checks, place, keep)


@dataclass(frozen=True)
class Work:
    """What a run is about.

    Attributes:
        path: The user's file.
        prepared: The float graph in the form that quantizes best.
        rows: Calibration rows.
        held_out: Rows that nothing is fitted to.
        labelled: Rows with classes, if there are any.
        settings: The resolved recipe.
        log: Progress.
    """

    path: Path
    prepared: Prepared
    rows: Dataset
    held_out: Dataset
    labelled: LabelledDataset | None
    settings: Recipe
    log: Log

    @cached_property
    def provenance(self) -> dict[str, str]:
        """What the file says about itself."""
        return {
            "onnxq.version": __version__,
            "onnxq.recipe": json.dumps(asdict(self.settings), sort_keys=True),
            "onnxq.source": self.path.name,
            "onnxq.source_sha256": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "onnxq.data": json.dumps(self.rows.provenance, sort_keys=True, default=str),
            "onnxq.runtime": runtime.version(),
        }


@dataclass(frozen=True)
class Data:
    """Rows as the user gave them: to calibrate with, with labels, and how images become inputs."""

    rows: Any
    labelled: Any
    preprocess: Preprocess | None
    batch: int | None


def _work(path: Path, loaded: Model, data: Data, settings: Recipe, log: Log) -> Work:
    """Rows opened and split, the graph prepared."""
    inputs = model_inputs(loaded)
    dataset = calibrate.open_data(
        data.rows, inputs, preprocess=data.preprocess, samples=settings.samples, batch=data.batch
    )
    classes = None
    if data.labelled is not None:
        classes = calibrate.open_labelled(data.labelled, inputs, preprocess=data.preprocess, batch=data.batch)
    rows, held_out = calibrate.split(dataset)
    prepared = _prepared(path, loaded, dataset, rows, settings, log)
    return Work(path, prepared, rows, held_out, classes, settings, log)


def _quantized(work: Work, checks: Checks, place: Workplace, keep: bool) -> QuantizedModel:
    """Place, observe, plan, tune, emit, verify."""
    prepared, settings, log = work.prepared, work.settings, work.log
    placement, observations = observe(prepared.model, work.rows, settings, log)
    macs = bench.float_macs(prepared.model, observations.shapes, observations.batch_rows)
    plan, missed = _planned(work, placement, observations, macs, keep, place)
    outcome = tune(prepared.model, Tuned(plan), work.rows, settings, log, place)
    tuned = outcome.tuned
    quantized = _emitted(work, tuned)
    verdict = found = None
    if checks.verify:
        timed, seed = checks.time_it, settings.seed
        verdict = verify(prepared, quantized, tuned.plan, work.held_out, macs, time_it=timed, seed=seed, log=log)
    if checks.explain:
        found = details(prepared, quantized, tuned, observations, work.held_out, log=log)
    return QuantizedModel(
        model=quantized,
        plan=tuned.plan,
        prepared=prepared,
        recipe=settings,
        data=work.rows.provenance,
        rows=observations.rows,
        verdict=verdict,
        learned=tuned.layers,
        blocks=outcome.blocks,
        missed=missed or _too_large(work, quantized) or _too_slow(settings, verdict),
        details=found,
        progress=place.progress if keeps_progress(settings) else None,
    )


def _planned(
    work: Work, placement: Placement, seen: Observations, macs: Mapping[str, int], keep: bool, place: Workplace
) -> tuple[QuantPlan, str]:
    """The plan, and why budgets are not met ("" where they are, or there are none)."""
    model, settings, log = work.prepared.model, work.settings, work.log
    if not settings.wishes:
        ranges = choose_ranges(model, placement, seen, work.rows, settings, log)
        return plan_of(model, placement, ranges, work.rows, settings, log), ""
    found = calibrated(model, placement, seen, work.rows, settings, [settings.activation_bits], log)
    ask = Ask(work.path, found, settings, work.rows, work.held_out, work.labelled, macs, work.provenance, place)
    allotted = allot(ask, keep=keep, log=log)
    for sentence in describe(allotted.choice):
        log.note(sentence)
    return allotted.choice.plan, allotted.missed


def _emitted(work: Work, tuned: Tuned) -> Model:
    work.log.stage("Writing the quantized graph")
    packed = work.settings.packed and any(grid.bits < 7 for grid in tuned.plan.weights.values())
    return emit(work.prepared.model, tuned.plan, work.provenance, tuned.layers, packed=packed)


def _too_large(work: Work, quantized: Model) -> str:
    """Why the file is larger than asked for; "" where it is not."""
    limit = work.settings.wishes.max_size
    if limit is None:
        return ""
    most, found = limit.of(graph.disk_bytes(work.path)), written_bytes(quantized)
    return "" if found <= most else f"the size {work.settings.max_size} is not met: the file has {found} bytes."


def _too_slow(settings: Recipe, verdict: Verdict | None) -> str:
    """Why the measured latency is not what was asked for; "" where it is, or was not measured."""
    limit = settings.wishes.max_latency
    if limit is None or verdict is None or len(verdict.latency) < 2:
        return ""
    plain, quick = verdict.latency
    if quick.median_ms <= limit.of(plain.median_ms) * SLACK:
        return ""
    ratio = quick.median_ms / plain.median_ms
    return f"the latency {settings.max_latency} is not met: {quick.median_ms:.3f} ms, {ratio:.2f}x, was measured."


def _prepared(path: str | Path, loaded: Model, dataset: Dataset, rows: Dataset, settings: Recipe, log: Log) -> Prepared:
    """The float graph in the form that quantizes best."""
    fixed = any(spec.shape and isinstance(spec.shape[0], int) for spec in model_inputs(loaded))
    rewrites = passes.rewrites(equalize=not settings.per_channel, without=settings.without)
    prepared = prepare(path, loaded, lambda: probe_of(dataset, fixed), log, rewrites)
    if settings.migrate_norms:
        prepared = migrate_norms(prepared, rows, probe_of(rows, fixed), settings, log)
    return prepared


def _require_layers(model: Model, path: Path) -> None:
    if not any(graph.nodes(model, *graph.LAYER_OPS)):
        raise UnsupportedError(f"{path.name} has no Conv, Gemm or MatMul: there is nothing to quantize.")
