"""One plan, several files: a plan that `quantize` kept, emitted again for its own target or for another one.

For its own target the bytes are those that `quantize` wrote. For another one placement is decided anew, grids come from
the plan's ranges (a symmetric one keeps the larger end), and weights keep their codes wherever that target takes their
steps; learned biases stay. What the plan knows no range of stays in float.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from onnxq import graph, passes
from onnxq.emit import emit
from onnxq.errors import InputError, ModelError, UsageError
from onnxq.graph import Model
from onnxq.grid import Grid
from onnxq.passes.readings import Migration
from onnxq.pipeline.prepare import load_float, prepare_again
from onnxq.pipeline.retarget import UNKNOWN, retarget
from onnxq.plan import Origin, load_learned, load_with_origin
from onnxq.types import LearnedLayer, Log, QuantPlan, Silence, TensorGrid, Tuned
from onnxq.types.target import TARGETS, Target, target_of


@dataclass(frozen=True)
class Emitted:
    """A plan emitted again.

    Attributes:
        model: The file's graph.
        plan: What it was made from: the plan, or that of the other target.
        source: The float file.
        changes: What another target changed, in sentences; empty for the plan's own.
    """

    model: Model
    plan: QuantPlan
    source: Path
    changes: tuple[str, ...] = ()


def reemit(path: Path, target: str | None = None, *, model: Path | None = None, log: Log = Silence()) -> Emitted:
    """Emit the plan in `path`.

    Args:
        path: A plan file that says where it came from; codes that were learned lie beside it, in a file ending in .npz.
        target: For which target; None for the plan's own.
        model: The float file, where it is not in its old place.
        log: Progress.

    Raises:
        InputError: The plan, what was learned or the model cannot be read, or the model is another one.
        UsageError: There is no such target.
        UnsupportedError: Nothing in the model runs in integers on the target.
    """
    plan, origin = load_with_origin(path)
    wanted = plan.target if target is None else target
    if wanted not in ("auto", *TARGETS) or plan.target not in TARGETS:
        raise UsageError(f"there is no target {wanted!r}; targets: {', '.join(TARGETS)}.")
    source = model or path.parent / origin.model
    float_model = _prepared(source, path, origin, plan, log)
    learned = _learned(path, origin)
    log.stage("Writing the quantized graph")
    if target_of(wanted).name == plan.target:
        return Emitted(
            emit(float_model, plan, origin.metadata, learned, packed=origin.packed, fused=True), plan, source
        )
    tuned = retarget(float_model, Tuned(plan, learned), target_of(wanted), origin.ranges)
    packed = target_of(wanted).packed and any(grid.bits < 7 for grid in tuned.plan.weights.values())
    metadata = _metadata(origin, target_of(wanted))
    made = emit(float_model, tuned.plan, metadata, tuned.layers, packed=packed, fused=True)
    return Emitted(made, tuned.plan, source, tuple(_changes(Tuned(plan, learned), tuned)))


def _prepared(source: Path, path: Path, origin: Origin, plan: QuantPlan, log: Log) -> Model:
    """The float graph that the plan was made for."""
    if not source.is_file():
        raise ModelError(f"{path.name} is for {origin.model}, which is not there; say where it is with --model.")
    if graph.file_digest(source) != origin.sha256:
        raise InputError(f"{source.name} is not the model that {path.name} is for: its SHA-256 is another.")
    log.stage("Simplifying")
    again = prepare_again(
        source,
        load_float(source),
        passes.rewrites(equalize=origin.equalize, without=origin.without),
        {name: _migration(given, path.name) for name, given in origin.migrations.items()},
        simplified=origin.simplified,
        rewritten=origin.rewritten,
    )
    if graph.digest(again.model) != plan.source:
        raise InputError(
            f"{source.name} becomes another graph than {path.name} was made for: this onnxq or onnxsim is of another "
            "version, or external weights changed. Quantize it again."
        )
    return again.model


def _migration(given: Mapping[str, object], where: str) -> Migration:
    try:
        ratios, shifts = (np.asarray(given[key], np.float64) for key in ("ratios", "shifts"))
        return Migration(ratios, shifts, float(str(given["scale"])), int(str(given["zero_point"])))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{where}: a migration holds a value of the wrong kind: {error}") from error


def _learned(path: Path, origin: Origin) -> Mapping[str, LearnedLayer]:
    if not origin.learned:
        return {}
    beside = path.with_suffix(".npz")
    if not beside.is_file():
        raise InputError(f"{path.name} has learned codes, and {beside.name} is not beside it.")
    return load_learned(beside)


def _metadata(origin: Origin, target: Target) -> dict[str, str]:
    """What the file says about itself, with the target that it is for."""
    said = dict(origin.metadata)
    recipe = json.loads(said.get("onnxq.recipe", "{}"))
    said["onnxq.recipe"] = json.dumps({**recipe, "target": target.name}, sort_keys=True)
    said["onnxq.planned_for"] = str(recipe.get("target", ""))
    return said


def _changes(old: Tuned, new: Tuned) -> Iterator[str]:
    """What is different for the new target."""
    before, after = old.plan, new.plan
    target = TARGETS[after.target]
    if after.half:
        yield f"{len(after.half)} nodes compute in float16, none in integers; the plan has {len(before.weights)} layers"
        return
    both = [name for name in after.tensors if name in before.tensors]
    kinds = Counter((_kind(before.tensors[name]), _kind(after.tensors[name])) for name in both)
    for (was, now), count in kinds.items():
        if was != now:
            around = ", around zero: a range [0, a] becomes [-a, a]" if target.signed else ""
            yield f"{count} tensors change from {was} to {now}{around}"
    added, gone = len(after.tensors) - len(both), len(before.tensors) - len(both)
    if added or gone:
        yield f"{added} tensors get a grid, {gone} have none any more"
    if target.float_bias != TARGETS[before.target].float_bias:
        yield f"biases are {'float32' if target.float_bias else 'int32'}"
    anew = [name for name, grid in after.weights.items() if before.weights.get(name) != grid]
    lost = sum(name in old.layers for name in anew)
    if anew:
        yield f"{len(anew)} of {len(after.weights)} weights get other steps" + (
            f", {lost} lose learned codes" if lost else ""
        )
    dropped = [name for name in before.weights if name not in after.weights]
    if dropped:
        yield f"{len(dropped)} layers stay in float, the first is {dropped[0]}: {after.skipped.get(dropped[0], '')}"
    for what, had, has in (
        ("rounding borders", before.borders, after.borders),
        ("logarithmic grids", before.log_softmax, after.log_softmax),
    ):
        if had and not has:
            yield f"{len(had)} {what} are left out"
    reached = sum(reason == UNKNOWN for reason in after.skipped.values())
    if reached:
        yield f"{reached} nodes stay in float: {UNKNOWN}; quantize --save-plan measures them all"


def _kind(grid: TensorGrid) -> str:
    codes = Grid(grid.bits, grid.signed, symmetric=False)
    return np.dtype(codes.dtype).name + (f" of {grid.bits} bits" if grid.bits not in (8, 16) else "")
