"""Sensitivity: the error that every layer adds at every number of bits, with all others at 8 bits."""

from __future__ import annotations

import hashlib
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path

from scipy.stats import spearmanr

from onnxq import graph
from onnxq.calibrate.observe import count_rows
from onnxq.emit import emit
from onnxq.errors import EnvironmentFault
from onnxq.jobs import open_backend, require_backend, results
from onnxq.pipeline.calibrated import Calibrated
from onnxq.pipeline.trials import Walk
from onnxq.plan import find_blocks, plan_to_json
from onnxq.runtime import Session, SessionConfig
from onnxq.tune import TuneMoments, walk
from onnxq.tune.sensitivity import measure, output_error
from onnxq.types import Feeds, Log, QuantPlan, Silence, Tuned
from onnxq.types.mixed import BASE, FLOAT, Added, Allocation, Bits, Sensitivities

SCHEMA = 3
"""Of the kept results: another number makes them all unknown."""


def sensitivities(
    found: Calibrated,
    options: Sequence[Bits],
    batches: Sequence[Feeds],
    *,
    tuned: bool = True,
    workers: int = 0,
    backend: str = "local",
    cache: Path | None = None,
    log: Log = Silence(),
) -> Sensitivities:
    """Measure every group of layers at every one of `options`.

    Args:
        found: The calibrated model.
        options: Bits to try; float costs nothing by definition, and 8/8 adds nothing at the outputs.
        batches: Calibration rows.
        tuned: Match each group's moments before it is measured, as the final network's will be.
        workers: Processes; 0 for one per core. The result does not depend on it.
        backend: Where they are, see `onnxq.jobs.open_backend`. The result does not depend on it either.
        cache: Folder of results that are kept from run to run; None keeps none.
        log: Progress.

    Raises:
        UsageError: No such backend, or no ranges for some activation bits.
        EnvironmentFault: The folder `cache` cannot be written, or the backend cannot be reached.
    """
    require_backend(backend)
    log.stage("Measuring sensitivities")
    tried = [bits for bits in dict.fromkeys((BASE, *options)) if bits != FLOAT]
    plans = {
        group: {bits: found.plan(dict.fromkeys(layers, bits)) for bits in tried}
        for group, layers in found.groups.items()
    }
    store = _Store(cache, found, batches, tuned)
    known = {group: store.known(layers, plans[group]) for group, layers in found.groups.items()}
    missing = {
        group: {bits: plan for bits, plan in plans[group].items() if bits not in known[group]} for group in plans
    }
    with tempfile.TemporaryDirectory(prefix="onnxq-") as scratch:
        walk = Walk(found, missing, batches, Path(scratch), tuned=tuned)
        with open_backend(backend, workers) as workplace:
            for done, (task, errors) in enumerate(results(workplace, measure, walk.trials())):
                trial = task.argument
                store.keep(trial.layers, trial.plans, errors)
                known[trial.group].update(errors)
                walk.release(trial)
                log.step(f"{done + 1} of {sum(map(bool, missing.values()))} groups of layers")
    added = {group: _added(entries, options) for group, entries in known.items()}
    rows = sum(count_rows(feeds) for feeds in batches)
    return Sensitivities(walk.base_error, found.groups, added, rows)


def remeasured(
    found: Calibrated,
    known: Sensitivities,
    points: Sequence[Allocation],
    batches: Sequence[Feeds],
    *,
    tuned: bool = True,
    log: Log = Silence(),
) -> tuple[Allocation, ...]:
    """The same points with the error that their networks really add: what was predicted is a sum over layers.

    Args:
        found: The calibrated model.
        known: What the points were made from.
        points: Bits by group; none in float.
        batches: Rows; the ones that `known` was measured on make the two comparable.
        tuned: Match the moments of the whole network.
        log: Progress.
    """
    log.stage("Measuring the chosen bits")
    shaped = found.model.clone()
    graph.infer_shapes(shaped)
    blocks = find_blocks(shaped)
    session = Session(emit(found.model, found.base), SessionConfig(stop_spinning=True))
    wanted = [session.run(feeds) for feeds in batches]
    measured = []
    for index, point in enumerate(points):
        state = Tuned(found.plan(found.by_layer(point.bits)))
        if tuned:
            state, _ = walk(found.model, state, blocks, [TuneMoments()], batches)
        error = output_error(emit(found.model, state.plan, learned=state.layers), batches, wanted)
        measured.append(replace(point, measured=error))
        log.step(f"{index + 1} of {len(points)} points")
    return tuple(measured)


def additivity(points: Sequence[Allocation]) -> float:
    """Rank correlation (Spearman) of predicted and measured degradation; NaN for fewer than three points."""
    pairs = [(point.degradation, point.measured) for point in points if point.measured is not None]
    return float(spearmanr(*zip(*pairs, strict=True)).statistic) if len(pairs) > 2 else math.nan


def _added(entries: Mapping[Bits, Added], options: Sequence[Bits]) -> dict[Bits, Added]:
    """Errors for the bits asked for and 8/8."""
    added = {}
    for bits in dict.fromkeys((BASE, *options)):
        added[bits] = Added(0.0, 0.0) if bits == FLOAT else entries[bits]
    return added


class _Store:
    """Results by what they depend on: the model, the base, the rows, and the plan that was tried."""

    def __init__(self, folder: Path | None, found: Calibrated, batches: Sequence[Feeds], tuned: bool) -> None:
        self._folder = folder
        if folder is None:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EnvironmentFault(f"{folder} cannot be made: {error.strerror or error}.") from error
        content = hashlib.sha256(f"{SCHEMA} {tuned} {plan_to_json(found.base)}".encode())
        for feeds in batches:
            for name in sorted(feeds):
                content.update(f"{name} {feeds[name].dtype} {feeds[name].shape}".encode())
                content.update(feeds[name].tobytes())
        self._content = content

    def _path(self, layers: Sequence[str], plan: QuantPlan) -> Path:
        assert self._folder is not None
        key = self._content.copy()
        key.update(f"{list(layers)} {plan_to_json(plan)}".encode())
        return self._folder / f"{key.hexdigest()}.json"

    def known(self, layers: Sequence[str], plans: Mapping[Bits, QuantPlan]) -> dict[Bits, Added]:
        """What earlier runs found; files that cannot be read count as not there."""
        found = {}
        for bits, plan in plans.items() if self._folder is not None else ():
            with suppress(OSError, ValueError, TypeError):
                found[bits] = Added(**json.loads(self._path(layers, plan).read_text(encoding="utf-8")))
        return found

    def keep(self, layers: Sequence[str], plans: Mapping[Bits, QuantPlan], errors: Mapping[Bits, Added]) -> None:
        """Write what was found."""
        for bits, entry in errors.items() if self._folder is not None else ():
            path = self._path(layers, plans[bits])
            try:
                with graph.atomic_path(path) as temporary:
                    temporary.write_text(json.dumps(asdict(entry)), encoding="utf-8")
            except OSError as error:
                raise EnvironmentFault(f"{path} cannot be written: {error.strerror or error}.") from error
