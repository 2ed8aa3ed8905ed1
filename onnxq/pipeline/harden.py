"""`harden`: fine-tune a float model's weights so that they are easy to quantize; no labels.

Load, simplify and fold, train by self-distillation with a range loss, judge on held-out rows, keep or put back.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onnxq import bench, calibrate, graph, passes
from onnxq.calibrate import RULES, Preprocess
from onnxq.calibrate.observe import count_rows
from onnxq.emit import emit
from onnxq.errors import UnsupportedError, UsageError
from onnxq.graph import Model
from onnxq.grid import Grid
from onnxq.pipeline.prepare import Prepared, load_float, model_inputs, prepare, probe_of, rows_are_free
from onnxq.plan import Precision, Range, find_blocks, make_plan, place
from onnxq.report.harden import HardenedLayer, Hardening, LowBits
from onnxq.runtime import Session, SessionConfig
from onnxq.tune import TuneMoments, batches_of, walk
from onnxq.tune.methods import find_device, require_torch
from onnxq.types import Feeds, Fidelity, Log, Silence, Tuned
from onnxq.version import __version__

if TYPE_CHECKING:
    from onnxq.train import Imported, Kind, WeightRange

LATER = ("NormToConv", "MeanToPool", "PoolToConv", "TransposeToDepth", "MergeGroups")
"""Rewrites that `quantize` does anyway, and whose constants and zeros must not be trained."""
BITS = (4, 3, 2)
OBSERVED_ROWS = 128
"""Rows that set the activation ranges of the models that are compared."""
TOLERANCE = 1e-3
"""Most that torch may differ from onnxruntime, of an output's range."""
QUIET = SessionConfig(stop_spinning=True)


@dataclass(frozen=True)
class HardenSettings:
    """How `harden` trains and judges.

    Attributes:
        kind: The range loss, see `onnxq.train.R2Loss`.
        strength: Its weight.
        per_channel: For grids with one step per output channel, or with one per weight: what ranges the loss looks at,
            and which quantized models decide whether the result is kept.
        iterations: Steps, one batch each; None for `epochs`.
        epochs: Times that every row is seen.
        rate: Learning rate, in units of each weight's root mean square.
        batch: Rows per step.
        samples: Most rows.
        floor_db: Least signal-to-noise ratio of the float outputs against the original's, in decibels.
        device: "auto" (a GPU if there is one), "cpu", "cuda" or "cuda:N".
        seed: Of everything random.

    Raises:
        UsageError: A number is out of its range.
    """

    kind: Kind = "margin"
    strength: float = 0.1
    per_channel: bool = True
    iterations: int | None = None
    epochs: int = 40
    rate: float = 2e-3
    batch: int = 32
    samples: int = 512
    floor_db: float = 15.0
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = {"iterations": self.iterations or 1, "epochs": self.epochs, "batch": self.batch}
        for name, value in {**counts, "samples": self.samples, "rate": self.rate}.items():
            if not 0 < value < math.inf:
                raise UsageError(f"{name} must be more than 0, not {value}.")
        if not 0 <= self.strength < math.inf:
            raise UsageError(f"strength must be at least 0, not {self.strength}.")


@dataclass(frozen=True)
class Hardened:
    """The result of `harden`.

    Attributes:
        model: The float model, hardened; the simplified original where that was not kept.
        report: What was done and what it gave; its `output` is empty.
    """

    model: Model
    report: Hardening

    def save(self, path: str | Path) -> Hardening:
        """Write the ONNX file, whole or not at all; returns the report with its path."""
        graph.save(self.model, Path(path))
        return replace(self.report, output=str(path))


def harden(
    model: str | Path,
    data: Any,
    settings: HardenSettings = HardenSettings(),
    *,
    preprocess: Preprocess | None = None,
    log: Log = Silence(),
) -> Hardened:
    """Fine-tune a float ONNX model towards narrow weights, with itself as the teacher.

    The result is another float model with the same inputs and outputs. The original's outputs stay the reference.

    Args:
        model: Path of the float model.
        data: Unlabelled rows in any form that `quantize` takes.
        settings: How to train and judge.
        preprocess: What is done to images.
        log: Progress.

    Raises:
        EnvironmentFault: PyTorch is missing or has no such device.
        InputError: The model or the data cannot be read or does not fit.
        UnsupportedError: The model has no layers, or torch cannot run it.
    """
    began = time.monotonic()
    require_torch("harden")
    from onnxq import train

    device = find_device(settings.device)
    log.stage("Reading the model")
    loaded = load_float(model)
    free = rows_are_free(loaded)
    dataset = calibrate.open_data(data, model_inputs(loaded), preprocess=preprocess, samples=settings.samples)
    rows, held = calibrate.split(dataset)
    probe = probe_of(dataset, not free)
    prepared = prepare(model, loaded, lambda: probe, log, passes.rewrites(without=LATER))
    student = _student(prepared.model, probe)
    before = train.ranges_of(student.ranged_weights())
    batches = list(batches_of(rows, settings.batch, free=free, limit=settings.samples))
    losses = _train(student, batches, settings, device, log)
    trained = student.written(prepared.model)
    after = train.ranges_of(student.ranged_weights())
    log.stage("Judging on held-out rows")
    fidelity = bench.compare(Session(prepared.model, QUIET), Session(trained, QUIET), held)
    low_bits = _low_bits(prepared.model, trained, batches, list(held), log)
    kept, reason = _verdict(fidelity, low_bits, settings)
    report = Hardening(
        source=str(model),
        output="",
        kept=kept,
        reason=reason,
        rows=sum(count_rows(feeds) for feeds in batches),
        fidelity=fidelity,
        layers=_layers(before, after),
        low_bits=low_bits,
        losses=losses,
        settings=asdict(settings),
        seconds=time.monotonic() - began,
    )
    return Hardened(_signed(trained if kept else prepared.model.clone(), prepared, report), report)


def _student(model: Model, probe: Feeds) -> Imported:
    """The model in torch, checked against onnxruntime."""
    from onnxq.train import Imported

    if not any("float" in (graph.dtype_name(value) or "float") for value in model.graph.outputs):
        raise UnsupportedError("no output of this model is a float: there is nothing to learn from.")
    student = Imported(model)
    error = student.error(model, probe)
    if not error <= TOLERANCE:
        raise UnsupportedError(
            f"PyTorch computes this model otherwise than onnxruntime (by {error:.2g} of an output's range); "
            "it cannot be trained here."
        )
    return student


def _train(
    student: Imported, batches: Sequence[Feeds], settings: HardenSettings, device: str, log: Log
) -> dict[str, tuple[float, float]]:
    """Train in place; the first and last losses."""
    from onnxq import train

    log.stage("Training")
    iterations = settings.iterations or settings.epochs * len(batches)
    how = train.Distillation(
        kind=settings.kind,
        strength=settings.strength,
        per_channel=settings.per_channel,
        iterations=iterations,
        rate=settings.rate,
        seed=settings.seed,
        device=device,
    )
    trace = train.distill(student, batches, how, log)
    part = max(1, iterations // 10)
    ends = {}
    for index, name in enumerate(("distillation", "range")):
        values = [losses[index] for losses in trace]
        ends[name] = (sum(values[:part]) / part, sum(values[-part:]) / part)
    log.note(
        f"distillation loss {ends['distillation'][0]:.4g} -> {ends['distillation'][1]:.4g}, "
        f"range loss {ends['range'][0]:.4g} -> {ends['range'][1]:.4g} in {iterations} iterations"
    )
    return ends


def _low_bits(
    original: Model, trained: Model, batches: Sequence[Feeds], held: Sequence[Feeds], log: Log
) -> tuple[LowBits, ...]:
    """What W4, W3 and W2 with 8-bit activations make of both models."""
    reference = Session(original, QUIET)
    found = []
    for per_channel in (True, False):
        rewrites = passes.rewrites(equalize=not per_channel)
        sides = [_Side(model, rewrites, batches) for model in (original, trained)]
        for bits in BITS:
            log.step(f"W{bits} {'per channel' if per_channel else 'per tensor'}")
            before, after = (_nearest(reference, side.quantized(bits, per_channel), held) for side in sides)
            found.append(LowBits(bits, per_channel, before, after))
    return tuple(found)


def _nearest(reference: Session, candidates: Iterable[Model], held: Sequence[Feeds]) -> Fidelity:
    return max((bench.compare(reference, Session(model, QUIET), held) for model in candidates), key=_decibels)


class _Side:
    """A float model made ready for quantization: rewritten, placed, observed."""

    def __init__(self, model: Model, rewrites: Sequence[passes.Pass], batches: Sequence[Feeds]) -> None:
        self._model, self._batches = model.clone(), batches
        passes.apply(self._model, rewrites)
        graph.infer_shapes(self._model)
        self._placement = place(self._model)
        if not self._placement.layers:
            raise UnsupportedError("nothing in this model can run in integers: there is nothing to harden it for.")
        rows = calibrate.open_data(list(batches), model_inputs(model), samples=OBSERVED_ROWS)
        seen = calibrate.observe(self._model, rows, self._placement.tensors)
        grid, rule = Grid(8, signed=False, symmetric=False), RULES["mse"]
        self._ranges = {name: Range(*rule(stats, grid), "mse") for name, stats in seen.tensors.items()}

    def quantized(self, bits: int, per_channel: bool) -> Iterator[Model]:
        """By plain rounding, and with matched means and spreads, as `quantize` does it where that helps."""
        precision = Precision(weight_bits=bits, per_channel=per_channel)
        plan = make_plan(self._model, self._placement, self._ranges, precision)
        yield emit(self._model, plan)
        tuned, _ = walk(self._model, Tuned(plan), find_blocks(self._model), [TuneMoments()], self._batches)
        yield emit(self._model, tuned.plan, learned=tuned.layers)


def _decibels(found: Fidelity) -> float:
    """The mean SQNR of the outputs; an output that is all noise counts as one whose noise equals its signal."""
    return sum(min(max(sqnr, 0.0), 99.0) for sqnr in found.sqnr_db.values()) / len(found.sqnr_db)


def _verdict(fidelity: Fidelity, low_bits: Sequence[LowBits], settings: HardenSettings) -> tuple[bool, str]:
    """Whether the trained weights are kept, and why."""
    reached = min(fidelity.sqnr_db.values())
    if reached < settings.floor_db:
        return False, (
            f"the float outputs moved too far: {reached:.1f} dB on held-out rows, below {settings.floor_db:g} dB; "
            "lower --strength or --rate"
        )
    judged = [entry for entry in low_bits if entry.per_channel == settings.per_channel]
    gain = sum(_decibels(entry.after) - _decibels(entry.before) for entry in judged) / len(judged)
    where = f"at W{judged[0].bits} to W{judged[-1].bits} {'per channel' if settings.per_channel else 'per tensor'}"
    if gain <= 0:
        return False, f"quantized outputs come no nearer to the float ones ({gain:+.2f} dB on average {where})"
    return True, f"quantized outputs come nearer to the float ones, by {gain:.2f} dB on average {where}"


def _layers(before: Sequence[WeightRange], after: Sequence[WeightRange]) -> tuple[HardenedLayer, ...]:
    return tuple(
        HardenedLayer(a.name, (a.per_tensor, b.per_tensor), (a.per_channel, b.per_channel))
        for a, b in zip(before, after, strict=True)
    )


def _signed(model: Model, prepared: Prepared, report: Hardening) -> Model:
    """`model` with its provenance."""
    made = {name: value for name, value in report.settings.items() if name != "device"} | {"kept": report.kept}
    model.metadata_props["onnxq.version"] = __version__
    model.metadata_props["onnxq.harden"] = json.dumps(made, sort_keys=True)
    model.metadata_props["onnxq.source"] = prepared.path.name
    return model
