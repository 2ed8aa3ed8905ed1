"""`quantize`: load, prepare, place, observe, choose ranges, plan, emit, verify."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from onnxq import bench, calibrate, graph, passes, runtime
from onnxq.calibrate import LabelledDataset, Preprocess
from onnxq.emit import emit
from onnxq.errors import UnsupportedError
from onnxq.graph import Model
from onnxq.pipeline.budgeting import Ask, allot, calibrated, describe, require_consistent
from onnxq.pipeline.checkpoint import Clock, kept_clock
from onnxq.pipeline.choice import Choice
from onnxq.pipeline.explain import explained
from onnxq.pipeline.forms import formed
from onnxq.pipeline.migration import migrate_norms, migrates
from onnxq.pipeline.planning import choose_ranges, observe, plan_of
from onnxq.pipeline.prepare import Prepared, load_float, model_inputs, prepare, probe_of, rows_are_free
from onnxq.pipeline.result import Checks, QuantizedModel, left_out, packs
from onnxq.pipeline.stopwatch import measured
from onnxq.pipeline.targets import blocks_of, planned_half, ranges_of, require_target
from onnxq.pipeline.tuning import Outcome, Workplace, keeps_progress, require_learning, require_place, tune
from onnxq.pipeline.verify import too_large, too_slow, verify
from onnxq.pipeline.weight_only import guided_rounding, planned_weight_only, require_weight_only
from onnxq.plan import Placement
from onnxq.recipe import Recipe, plain, resolve
from onnxq.types import Dataset, Log, Observations, Placed, QuantPlan, Silence, Tuned
from onnxq.types.target import target_of
from onnxq.version import __version__


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
    require_consistent(settings)
    require_target(settings)
    require_weight_only(settings)
    require_learning(settings, place)
    if target_of(settings.target).note:
        log.note(target_of(settings.target).note)
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
        sha256: Its digest.
        prepared: The float graph in the form that quantizes best.
        rows: Calibration rows.
        held_out: Rows that nothing is fitted to.
        labelled: Rows with classes, if there are any.
        settings: The resolved recipe.
        log: Progress.
        placed: What measured placement changed.
    """

    path: Path
    sha256: str
    prepared: Prepared
    rows: Dataset
    held_out: Dataset
    labelled: LabelledDataset | None
    settings: Recipe
    log: Log
    placed: Placed | None = None

    @property
    def provenance(self) -> dict[str, str]:
        """What the file says about itself."""
        back = {"onnxq.back_in_float": json.dumps(self.placed.nodes)} if self.placed and self.placed.back else {}
        return {
            **back,
            "onnxq.version": __version__,
            "onnxq.recipe": json.dumps(plain(self.settings), sort_keys=True),
            "onnxq.source": self.path.name,
            "onnxq.source_sha256": self.sha256,
            "onnxq.data": json.dumps(self.rows.provenance, sort_keys=True, default=str),
            "onnxq.runtime": runtime.version(),
        }

    @property
    def key(self) -> str:
        """A digest of model, data and recipe."""
        said = replace(self, placed=None).provenance
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


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
    return Work(path, graph.file_digest(path), prepared, rows, held_out, classes, settings, log)


def _quantized(work: Work, checks: Checks, place: Workplace, keep: bool) -> QuantizedModel:
    """Place, observe, plan, tune, emit, verify."""
    prepared, settings, log = work.prepared, work.settings, work.log
    target = target_of(settings.target)
    timed = checks.verify and checks.time_it and target.on_cpu and not target.untimed
    found_plan = _plan(work, keep, place, timed=timed)
    plan, observations, macs = found_plan.plan, found_plan.seen, found_plan.macs
    work = replace(work, placed=found_plan.placed)
    outcome = Outcome(Tuned(plan))
    if plan.weights:
        place = replace(place, clock=Clock(work.key, found_plan.placed))
        outcome = tune(prepared.model, Tuned(plan), work.rows, settings, log, place)
    elif settings.weight_only:
        outcome = guided_rounding(prepared.model, Tuned(plan), work.rows, log)
    tuned, forms = formed(prepared, outcome.tuned, work.rows, settings, log) if timed else (outcome.tuned, None)
    quantized = _emitted(work, tuned)
    verdict = found = None
    if checks.verify:
        threads = settings.threads if checks.time_it else 0
        verdict = verify(
            prepared,
            quantized,
            tuned.plan,
            work.held_out,
            macs,
            threads=threads,
            placed=work.placed,
            formed=forms,
            seed=settings.seed,
            log=log,
        )
    if checks.explain:
        found = explained(prepared, quantized, tuned, observations, (work.rows, work.held_out), found_plan.choice, log)
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
        steps=outcome.steps,
        missed=found_plan.missed or too_large(settings, work.path, quantized) or too_slow(settings, verdict),
        details=found,
        progress=place.progress if keeps_progress(settings) else None,
        ranges=ranges_of(prepared.model, work.rows) if checks.ranges else {},
    )


@dataclass(frozen=True)
class Plan:
    """A plan and what it rests on.

    Attributes:
        plan: Grids and placement.
        seen: What calibration saw.
        macs: Multiply-accumulates per row by node.
        missed: Why budgets are not met; "" where they are.
        placed: What measured placement changed.
        choice: What budgets chose; None where there are none.
    """

    plan: QuantPlan
    seen: Observations
    macs: Mapping[str, int]
    missed: str = ""
    placed: Placed | None = None
    choice: Choice | None = None


def _plan(work: Work, keep: bool, place: Workplace, *, timed: bool) -> Plan:
    """The plan for the recipe's target; where `timed`, the clock may move layers back to float."""
    model, settings, log = work.prepared.model, work.settings, work.log
    target = target_of(settings.target)
    if target.placing == "half":
        plan, seen = planned_half(model, work.rows, settings, log)
        return Plan(plan, seen, bench.float_macs(model, seen.shapes, seen.batch_rows))
    if settings.weight_only:
        plan, seen = planned_weight_only(model, work.rows, settings, log)
        return Plan(plan, seen, bench.float_macs(model, seen.shapes, seen.batch_rows))
    blocks = blocks_of(model, settings)
    placement, seen = observe(model, work.rows, settings, log, blocks)
    placed = None
    if timed:
        kept = kept_clock(place.progress, work.key) if place.progress is not None and keeps_progress(settings) else None
        faster = measured(work.prepared, placement, seen, work.rows, settings, log, kept)
        placement, placed = faster.placement, faster.placed
    macs = bench.float_macs(model, seen.shapes, seen.batch_rows)
    plan, missed, choice = _planned(replace(work, placed=placed), placement, seen, macs, keep, place)
    skipped = {name: reason for name, reason in plan.skipped.items() if name not in blocks}
    return Plan(replace(plan, blocks=blocks, skipped=skipped), seen, macs, missed, placed, choice)


def _planned(
    work: Work, placement: Placement, seen: Observations, macs: Mapping[str, int], keep: bool, place: Workplace
) -> tuple[QuantPlan, str, Choice | None]:
    """The plan, why budgets are not met ("" where they are, or there are none), and what they chose."""
    model, settings, log = work.prepared.model, work.settings, work.log
    if not settings.wishes:
        ranges = choose_ranges(model, placement, seen, work.rows, settings, log)
        return plan_of(model, placement, ranges, work.rows, settings, log), "", None
    found = calibrated(model, placement, seen, work.rows, settings, [settings.activation_bits], log)
    ask = Ask(work.path, found, settings, work.rows, work.held_out, work.labelled, macs, work.provenance, place)
    allotted = allot(ask, keep=keep, log=log)
    for sentence in describe(allotted.choice):
        log.note(sentence)
    return allotted.choice.plan, allotted.missed, allotted.choice


def _emitted(work: Work, tuned: Tuned) -> Model:
    work.log.stage("Writing the quantized graph")
    packed = packs(work.settings, tuned.plan)
    return emit(work.prepared.model, tuned.plan, work.provenance, tuned.layers, packed=packed, fused=True)


def _prepared(path: str | Path, loaded: Model, dataset: Dataset, rows: Dataset, settings: Recipe, log: Log) -> Prepared:
    """The float graph in the form that quantizes best."""
    fixed = not rows_are_free(loaded)
    rewrites = passes.rewrites(equalize=not settings.per_channel, without=left_out(settings))
    prepared = prepare(path, loaded, lambda: probe_of(dataset, fixed), log, rewrites)
    if migrates(settings):
        prepared = migrate_norms(prepared, graph.disk_bytes(Path(path)), rows, probe_of(rows, fixed), settings, log)
    return prepared


def _require_layers(model: Model, path: Path) -> None:
    if not any(graph.nodes(model, *graph.LAYER_OPS)):
        raise UnsupportedError(f"{path.name} has no Conv, Gemm or MatMul: there is nothing to quantize.")
