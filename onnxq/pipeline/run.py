"""`quantize`: load, prepare, place, observe, choose ranges, plan, emit, verify."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from onnxq import bench, calibrate, graph, passes, runtime
from onnxq.calibrate import RULES, Preprocess
from onnxq.emit import emit
from onnxq.errors import UnsupportedError, UsageError
from onnxq.graph import Layer, Model
from onnxq.grid import Grid
from onnxq.pipeline.migration import migrate_norms
from onnxq.pipeline.prepare import Prepared, load_float, model_inputs, prepare, probe_of, rows_are_free
from onnxq.pipeline.tuning import tune_moments
from onnxq.pipeline.verify import verify
from onnxq.plan import Groups, Placement, Precision, Range, activation_bits, make_plan, place, save_learned, save_plan
from onnxq.recipe import Recipe, resolve
from onnxq.types import Dataset, Feeds, LearnedLayer, Log, Observations, QuantPlan, Silence, Tuned, Verdict
from onnxq.version import __version__

TRIAL_ROWS = 16
"""Rows on which range candidates are compared."""


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
    """

    model: Model
    plan: QuantPlan
    prepared: Prepared
    recipe: Recipe
    data: Mapping[str, object]
    rows: int
    verdict: Verdict | None
    learned: Mapping[str, LearnedLayer]

    @property
    def simulated(self) -> bool:
        """Whether some grid has no kernel and is emulated at the cost of speed."""
        return any(grid.bits < 8 for grid in self.plan.tensors.values())

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
    check: bool = True,
    time_it: bool = True,
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
        check: Verify the result against the float model.
        time_it: Measure latency while verifying.
        log: Progress.
        **changes: Fields of `Recipe` that replace the recipe's.

    Returns:
        The quantized model with its plan and verdict; `save` writes it.

    Raises:
        InputError: The model or the data cannot be read or does not fit.
        UnsupportedError: Nothing in the model can be quantized.
        UsageError: The recipe contradicts itself.
    """
    settings = resolve(recipe, **changes)
    log.stage("Reading the model")
    loaded = load_float(model)
    _require_layers(loaded, Path(model))
    dataset = calibrate.open_data(
        data, model_inputs(loaded), preprocess=preprocess, samples=settings.samples, batch=batch
    )
    rows, held_out = calibrate.split(dataset)
    prepared = _prepared(model, loaded, dataset, rows, settings, log)
    placement, observations = _observe(prepared.model, rows, settings, log)
    ranges = _ranges(prepared.model, placement, observations, rows, settings, log)
    tuned = Tuned(_plan(prepared.model, placement, ranges, rows, settings, log))
    if settings.bn_tuning:
        tuned = tune_moments(prepared.model, tuned, rows, settings.seed, log)
    plan = tuned.plan
    log.stage("Writing the quantized graph")
    quantized = emit(prepared.model, plan, _provenance(Path(model), settings, rows.provenance), tuned.layers)
    verdict = None
    if check:
        macs = bench.float_macs(prepared.model, observations.shapes, observations.batch_rows)
        verdict = verify(prepared, quantized, plan, held_out, macs, time_it=time_it, seed=settings.seed, log=log)
    return QuantizedModel(
        quantized, plan, prepared, settings, rows.provenance, observations.rows, verdict, tuned.layers
    )


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


def _observe(model: Model, rows: Dataset, settings: Recipe, log: Log) -> tuple[Placement, Observations]:
    """Placement and statistics; tensors with infinities or NaN are taken out of the placement."""
    keep = _matches(model, settings.keep_float)
    placement = place(model, keep_float=keep)
    if not placement.layers:
        reasons = sorted({f"{name}: {reason}" for name, reason in placement.skipped.items()})[:3]
        raise UnsupportedError(f"nothing in this model can run in integers ({'; '.join(reasons)}).")
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
        placement = place(model, keep_float=keep, refuse=broken)
    return placement, observations


def _matches(model: Model, patterns: Sequence[str]) -> list[str]:
    names = list(graph.node_names(model))
    found: list[str] = []
    for pattern in patterns:
        matched = fnmatch.filter(names, pattern)
        if not matched:
            raise UsageError(f"keep-float pattern {pattern!r} matches no node of the simplified model.")
        found += matched
    return found


def _ranges(
    model: Model, placement: Placement, seen: Observations, rows: Dataset, settings: Recipe, log: Log
) -> dict[str, Range]:
    stats = {name: seen.tensors[name] for name in placement.tensors}
    seen_ranges = {name: Range(found.low, found.high, "minmax") for name, found in stats.items()}
    bits = activation_bits(placement, Groups(placement, seen_ranges), _precision(settings))
    grids = {name: Grid(count, signed=False, symmetric=False) for name, count in bits.items()}
    if settings.ranges != "auto":
        rule = RULES[settings.ranges]
        return {name: Range(*rule(found, grids[name]), settings.ranges) for name, found in stats.items()}
    log.stage("Choosing ranges")
    readers = _readers(placement)
    chosen = calibrate.choose(
        model,
        replace(seen, tensors=stats),
        readers,
        _some(rows, TRIAL_ROWS, model),
        grids,
        progress=log.advance,
    )
    return {name: Range(*found, judged=name in readers) for name, found in chosen.items()}


def _readers(placement: Placement) -> dict[str, list[Layer]]:
    readers: dict[str, list[Layer]] = {}
    for unit in placement.layers:
        if unit.layer is not None:
            readers.setdefault(graph.name_of(unit.layer.data), []).append(unit.layer)
    return readers


def _some(rows: Dataset, count: int, model: Model) -> list[Feeds]:
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


def _plan(
    model: Model,
    placement: Placement,
    ranges: Mapping[str, Range],
    rows: Dataset,
    settings: Recipe,
    log: Log,
) -> QuantPlan:
    precision = _precision(settings)
    plan = make_plan(model, placement, ranges, precision, target="cpu")
    if not (settings.portable or (settings.target == "auto" and runtime.saturates())):
        return plan
    log.stage("Looking for 16-bit saturation")
    layers = {unit.name: unit.layer for unit in placement.layers if unit.layer is not None}
    narrow = calibrate.saturating(model, layers, plan.tensors, plan.weights, _some(rows, 8, model), seed=settings.seed)
    if not narrow:
        return plan
    log.note(f"{len(narrow)} layers get 7-bit weights: without VNNI their sums would saturate")
    return make_plan(model, placement, ranges, replace(precision, narrow=frozenset(narrow)), target="cpu")


def _precision(settings: Recipe) -> Precision:
    return Precision(
        weight_bits=settings.weight_bits,
        activation_bits=settings.activation_bits,
        per_channel=settings.per_channel,
        first_last=settings.first_last,
        residual_bits=settings.residual_bits,
    )


def _provenance(path: Path, settings: Recipe, data: Mapping[str, object]) -> dict[str, str]:
    return {
        "onnxq.version": __version__,
        "onnxq.recipe": json.dumps(asdict(settings), sort_keys=True),
        "onnxq.source": path.name,
        "onnxq.source_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "onnxq.data": json.dumps(data, sort_keys=True, default=str),
        "onnxq.runtime": runtime.version(),
    }
