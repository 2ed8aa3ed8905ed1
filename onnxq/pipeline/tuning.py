"""Tuning as a stage: learned weights, then means and spreads, then biases.

Each is kept only if the model's outputs gain by it on rows that nothing was learned from.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from onnxq import graph
from onnxq.emit import emit
from onnxq.errors import UsageError
from onnxq.graph import Model
from onnxq.jobs import LOCAL, open_backend, require_backend
from onnxq.pipeline.checkpoint import Checkpoint, Clock, KeptLayers, Progress, key_of
from onnxq.pipeline.prepare import rows_are_free
from onnxq.plan import Block, find_blocks, layer_slices
from onnxq.recipe import Recipe
from onnxq.runtime import Session, SessionConfig
from onnxq.tune import DecisionSums, Method, TuneMoments, batches_of, halves, walk
from onnxq.tune.methods import MATCH_MOMENTS, find_device, learned_method, needs_torch, require_torch
from onnxq.types import Array, BlockResult, Dataset, Feeds, Log, Tuned, TuningStep

MOMENT_ROWS, MOMENT_BATCH = 128, 8
"""Most calibration rows that moments are measured on; more change little."""
LEARN_ROWS, LEARN_BATCH, LEAST_BATCH = 2048, 32, 8
LEARN_ELEMENTS = 1 << 20
"""Input elements of a batch above which it has fewer rows: a step on 32 images of 224 x 224 takes seconds."""
JUDGING_BATCHES = 8
"""Most batches of `MOMENT_BATCH` rows that judge."""
QUIET = SessionConfig(stop_spinning=True)


@dataclass(frozen=True)
class Workplace:
    """Where and how a run learns; nothing here changes what it is asked for.

    Attributes:
        device: "auto", "cpu", "cuda" or "cuda:N".
        workers: Processes of the unit "parallel" and of budgets; 0 takes one per processor.
        progress: Folder that keeps what was learned so far; None keeps nothing.
        resume: The folder must hold this run's state.
        backend: Where the processes are: "local", "dask://host:port" or "ray://host:port".
        clock: What was measured before learning, to be kept with its progress.
    """

    device: str = "auto"
    workers: int = 0
    progress: Path | None = None
    resume: bool = False
    backend: str = LOCAL
    clock: Clock | None = None


@dataclass(frozen=True)
class Outcome:
    """What tuning found.

    Attributes:
        tuned: Grids, codes and biases.
        blocks: What each learned method did to each block.
        steps: What each stage did to the model's outputs.
    """

    tuned: Tuned
    blocks: tuple[BlockResult, ...] = ()
    steps: tuple[TuningStep, ...] = ()


def keeps_progress(settings: Recipe) -> bool:
    """Whether a recipe learns weights, so that a folder can keep what it has found."""
    return settings.reconstruction != "none"


def require_place(settings: Recipe, place: Workplace) -> None:
    """Refuse a backend that cannot be used, before any work is done.

    Raises:
        UsageError: There is no such backend, or the recipe has no work for one.
        EnvironmentFault: It cannot be reached.
    """
    if place.backend == LOCAL:
        return
    if not settings.wishes and not (keeps_progress(settings) and settings.unit == "parallel"):
        raise UsageError(
            "--backend is for budgets (--max-size and the like) and for --unit parallel with a --reconstruction: this "
            "run has no work for other machines."
        )
    require_backend(place.backend)


def require_learning(settings: Recipe, place: Workplace) -> str:
    """The device to learn on; checked before any work is done. "" where nothing is learned with gradients.

    Raises:
        UsageError: There is no such device, or nothing that could be resumed.
        EnvironmentFault: PyTorch or the device is missing.
    """
    if place.resume and not keeps_progress(settings):
        raise UsageError("there is nothing to resume: only a reconstruction keeps its progress.")
    if settings.reconstruction == "none" and not settings.bias_tuning:
        return ""
    if not settings.bias_tuning and not needs_torch(settings.reconstruction) and place.device in ("auto", "cpu"):
        return "cpu"
    require_torch("learning")
    apart = place.backend != LOCAL and place.device == "auto" and settings.unit == "parallel"
    return find_device("cpu" if apart else place.device)  # the GPUs of this machine are not those of the cluster


def tune(model: Model, tuned: Tuned, rows: Dataset, settings: Recipe, log: Log, place: Workplace) -> Outcome:
    """Find better codes, steps and biases than plain rounding's.

    Args:
        model: The prepared float model.
        tuned: The plan.
        rows: Calibration rows.
        settings: Says what is tuned.
        log: Progress.
        place: Where and how.

    Raises:
        UsageError, EnvironmentFault: The device is not there, or the state to resume from is not this run's.
    """
    device = require_learning(settings, place)
    judge = Judge(model, rows)
    results: tuple[BlockResult, ...] = ()
    if settings.reconstruction != "none":
        found, results = reconstruct(model, tuned, rows, settings, log, place, device)
        tuned = judge.better(
            "weights", tuned, found, "learned weights are dropped: plain rounding is nearer to the float", log
        )
    if settings.bn_tuning and settings.reconstruction not in MATCH_MOMENTS:
        log.stage("Tuning means and spreads")
        found = tune_moments(model, tuned, rows, settings.seed, log)
        said = "means and spreads stay as rounding makes them: tuning them does not help this model"
        tuned = judge.better("means and spreads", tuned, found, said, log)
    if settings.bias_tuning:
        from onnxq.tune.biases import tune_biases

        log.stage("Tuning biases")
        batches = list(learning_batches(model, rows))
        found = tune_biases(model, tuned, batches, seed=settings.seed, device=device, log=log)
        tuned = judge.better("biases", tuned, found, "biases stay: tuning them does not help this model", log)
    return Outcome(tuned, results, tuple(judge.steps))


def tune_moments(model: Model, tuned: Tuned, rows: Dataset, seed: int, log: Log) -> Tuned:
    """Match mean and spread of every layer's result to the float model's."""
    batches = batches_of(rows, MOMENT_BATCH, free=rows_are_free(model), limit=MOMENT_ROWS)
    return walk(model, tuned, _blocks(model, find_blocks), [TuneMoments()], batches, seed=seed, log=log)[0]


def learning_batches(model: Model, rows: Dataset) -> Iterator[Feeds]:
    """Calibration rows in batches for gradient descent, smaller ones where rows are large."""
    first = next(iter(rows))
    largest = max(value.size // max(len(value), 1) if value.ndim else 1 for value in first.values())
    size = min(LEARN_BATCH, max(LEAST_BATCH, LEARN_ELEMENTS // max(largest, 1)))
    return batches_of(rows, size, free=rows_are_free(model), limit=LEARN_ROWS)


def reconstruct(
    model: Model, tuned: Tuned, rows: Dataset, settings: Recipe, log: Log, place: Workplace, device: str
) -> tuple[Tuned, tuple[BlockResult, ...]]:
    """Learn unit after unit, from where an interrupted run stopped; what every unit gained is returned with it."""
    log.stage(f"Learning weights ({settings.reconstruction})")
    method = learned_method(settings.reconstruction, iterations=settings.iterations, device=device)
    batches = learning_batches(model, rows)
    if settings.unit == "parallel":
        return _apart(model, tuned, method, list(batches), settings, log, place)
    limit = 1 if settings.unit == "layer" else 8
    blocks = _blocks(model, lambda shaped: find_blocks(shaped, limit=limit))
    key, kept = key_of(settings, tuned.plan), None
    if place.progress is not None:
        kept = Checkpoint(place.progress, key, resume=place.resume, clock=place.clock)
    start = (kept.read() if kept is not None else None) or Progress(0, tuned)
    if start.done:
        log.note(f"going on behind block {start.done} of {len(blocks)}, where an earlier run stopped")
    results = list(start.results)

    def keep(done: int, state: Tuned, found: Sequence[BlockResult]) -> None:
        results.extend(found)
        if kept is not None:
            kept.write(Progress(done, state, tuple(results)))

    found, _ = walk(
        model, start.tuned, blocks, [method], batches, seed=settings.seed, log=log, done=start.done, after=keep
    )
    return found, tuple(results)


def _apart(
    model: Model, tuned: Tuned, method: Method, batches: Sequence[Feeds], settings: Recipe, log: Log, place: Workplace
) -> tuple[Tuned, tuple[BlockResult, ...]]:
    """Learn every layer by itself; those that an interrupted run has done are not done again."""
    from onnxq.tune.parallel import parallel

    key, kept = key_of(settings, tuned.plan), None
    if place.progress is not None:
        kept = KeptLayers(place.progress, key, resume=place.resume, clock=place.clock)
    known = kept.read() if kept is not None else {}
    if known:
        log.note(f"going on behind {len(known)} layers, where an earlier run stopped")
    slices = _blocks(model, layer_slices)
    with open_backend(place.backend, place.workers) as backend:
        found, results = parallel(
            model, tuned, slices, method, batches, backend=backend, seed=settings.seed, log=log, known=known,
            after=kept.write if kept is not None else None,
        )  # fmt: skip
    return found, tuple(results)


def _blocks(model: Model, find: Callable[[Model], Sequence[Block]]) -> Sequence[Block]:
    shaped = model.clone()
    graph.infer_shapes(shaped)
    return find(shaped)


class Judge:
    """Compares states by the model's outputs on rows that nothing was learned from.

    Args:
        model: The prepared float model.
        rows: Calibration rows; some of the last fifth of them judge.

    Attributes:
        steps: What was compared so far.
    """

    def __init__(self, model: Model, rows: Dataset) -> None:
        self._model, self._rows = model, rows
        self._pairs: list[tuple[Feeds, Mapping[str, Array]]] = []
        self._known: tuple[Tuned, float] | None = None
        self.steps: list[TuningStep] = []

    def better(self, name: str, tuned: Tuned, found: Tuned, otherwise: str, log: Log) -> Tuned:
        """`found` where its outputs are nearer to the float model's; else `tuned`, and `otherwise` is said."""
        if found is tuned:
            return tuned
        error = self._known[1] if self._known is not None and self._known[0] is tuned else self.error(tuned)
        reached = self.error(found)
        better = reached < error
        self.steps.append(TuningStep(name, error, reached, better))
        self._known = (found, reached) if better else (tuned, error)
        if not better:
            log.note(otherwise)
        return self._known[0]

    def error(self, tuned: Tuned) -> float:
        """Noise over signal at the model's outputs; see `DecisionSums` for class scores."""
        if not self._pairs:
            self._pairs = self._read()
        session = Session(emit(self._model, tuned.plan, learned=tuned.layers), QUIET)
        sums = DecisionSums()
        for feeds, outputs in self._pairs:
            sums.add(outputs, session.run(feeds))
        return sums.relative()

    def _read(self) -> list[tuple[Feeds, Mapping[str, Array]]]:
        last: deque[Feeds] = deque(maxlen=JUDGING_BATCHES)
        count = 0
        for feeds in batches_of(self._rows, MOMENT_BATCH, free=rows_are_free(self._model), limit=LEARN_ROWS):
            last.append(feeds)
            count += 1
        held = list(last)[-len(halves(count)[1]) :]
        session = Session(self._model, QUIET)
        return [(feeds, session.run(feeds)) for feeds in held]
