"""From a file to the float graph that is quantized: loaded, simplified, normalised, checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from threading import Event

from onnxq import graph, passes, simplifier
from onnxq.errors import ModelError, RewriteError, UnsupportedError
from onnxq.graph import Model
from onnxq.passes.base import Pass, difference
from onnxq.passes.readings import Migration
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Applied, Array, Feeds, InputSpec, Log, Rewriting, Silence

PROBE_ROWS = 2
PROBE_SECONDS = 300.0
"""A model that computes longer than this on the first rows is given up: a loop in it may never end."""
PROBE_TOLERANCE = 1e-3
"""Of the output's range. Rewrites reorder float additions; a wrong one is off by far more."""


@dataclass(frozen=True)
class Prepared:
    """The float graph that everything after works on.

    Attributes:
        path: The file it came from.
        model: The prepared graph.
        original: The graph as loaded, without any rewrite.
        passes: What each rewrite did.
        simplified: None, or why simplification was left out.
        gap: Largest difference of any output to the original's on the probe, relative to the output's range; None
            without a probe.
        migrations: Scales that moved from normalisations and layers into the layers behind.
    """

    path: Path
    model: Model
    original: Model
    passes: tuple[Applied, ...]
    simplified: str | None
    gap: float | None = None
    migrations: Mapping[str, Migration] = field(default_factory=dict)

    def summary(self, output: Path) -> Rewriting:
        """The same as a value for reports, written to `output`."""
        before, after = (sum(1 for _ in graph.nodes(model)) for model in (self.original, self.model))
        return Rewriting(str(self.path), str(output), before, after, self.gap, self.passes, self.simplified)


def load_float(path: str | Path) -> Model:
    """Load a model that is not quantized yet.

    Raises:
        UnsupportedError: The file already holds quantized tensors.
    """
    model = graph.load(path)
    for node in graph.nodes(model):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") or node.op_type.startswith("QLinear"):
            raise UnsupportedError(
                f"{Path(path).name} is already quantized ({node.op_type} {node.name!r}); give the float model."
            )
    return model


def model_inputs(model: Model) -> list[InputSpec]:
    """The inputs that feeds must hold."""
    return [InputSpec(*spec) for spec in graph.input_specs(model)]


def rows_are_free(model: Model) -> bool:
    """Whether every input's first axis is free, so that batches may be cut into pieces."""
    return all(spec.shape and not isinstance(spec.shape[0], int) for spec in model_inputs(model))


def prepare(
    path: str | Path,
    model: Model,
    probing: Callable[[], Feeds] | None = None,
    log: Log = Silence(),
    rewrites: Sequence[Pass] | None = None,
) -> Prepared:
    """Simplify and normalise a loaded model, and check on a small batch that it still computes the same.

    Args:
        path: Its file, for messages.
        model: As `load_float` gave it; left as it is.
        probing: Gives that batch, while the simplifier works in its own process; None trusts the rewrites.
        log: Told what was left out.
        rewrites: The passes that follow simplification; None takes all, those of users among them.
    """
    rewrites = passes.rewrites() if rewrites is None else rewrites
    if graph.note(model):
        log.warn(graph.note(model))
    log.stage("Simplifying")
    stop = Event()
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(simplifier.simplify, model, stop=stop)
        try:
            probe = probing() if probing is not None else None
            before = _outputs(model, probe) if probe is not None else None
            simplified, reason = job.result()
        finally:
            stop.set()
    if reason is not None:
        log.warn(reason)
        simplified = model.clone()
    rewritten, applied = _rewrite(simplified, rewrites, None)
    gap = None
    if before is not None and probe is not None:
        gap, wrong = _mismatch(rewritten, probe, before)
        if wrong:
            gap, wrong = _mismatch(simplified, probe, before)
            if wrong:
                reason = f"simplification changed the model ({wrong}); continuing without it"
                log.warn(reason)
                simplified = model.clone()
            rewritten, applied = _guarded(simplified, rewrites, probe, log)
            gap, _ = _mismatch(rewritten, probe, before)
    return Prepared(Path(path), rewritten, model, tuple(applied), reason, gap)


def prepare_again(
    path: Path,
    model: Model,
    rewrites: Sequence[Pass],
    migrations: Mapping[str, Migration],
    *,
    simplified: bool,
    rewritten: bool,
) -> Prepared:
    """What `prepare` made of a model once before, without a batch to check it on.

    Args:
        path: Its file.
        model: As `load_float` gave it; left as it is.
        rewrites: The passes that followed simplification.
        migrations: Scales that then moved into the layers behind.
        simplified: Whether the simplifier's result was used.
        rewritten: Whether that of the passes was.
    """
    made, reason = simplifier.simplify(model, stop=Event()) if simplified else (model.clone(), "")
    made = model.clone() if reason else made
    graph.lift_constants(made)
    applied = passes.apply(made, rewrites) if rewritten else []
    if migrations:
        applied += passes.apply(made, passes.migrations(migrations))
    return Prepared(path, made, model, tuple(applied), reason or None, migrations=migrations)


def _rewrite(model: Model, rewrites: Sequence[Pass], probe: Feeds | None) -> tuple[Model, Sequence[Applied]]:
    rewritten = model.clone()
    graph.lift_constants(rewritten)
    return rewritten, passes.apply(rewritten, rewrites, probe)


def _guarded(model: Model, rewrites: Sequence[Pass], probe: Feeds, log: Log) -> tuple[Model, Sequence[Applied]]:
    """The rewrites one by one, as far as they keep the outputs."""
    try:
        return _rewrite(model, rewrites, probe)
    except RewriteError as error:
        log.warn(str(error))
        plain = model.clone()
        graph.lift_constants(plain)
        return plain, ()


def _outputs(model: Model, probe: Feeds) -> dict[str, Array]:
    return Session(model, SessionConfig(optimize="basic")).run(probe, limit_s=PROBE_SECONDS)


def _mismatch(model: Model, probe: Feeds, before: Mapping[str, Array]) -> tuple[float | None, str]:
    """The gap to the outputs `before` (None when the model does not run), and what is wrong, or an empty string."""
    try:
        gap, where = difference(before, _outputs(model, probe))
    except ModelError as error:
        return None, str(error)
    return gap, f"{where} by {gap:.2g} of its range" if gap > PROBE_TOLERANCE else ""


def probe_of(batches: Iterable[Feeds], fixed: bool) -> Feeds:
    """The first rows of the data; the whole first batch where the model fixes its size."""
    first = next(islice(iter(batches), 1))
    return first if fixed else {name: value[:PROBE_ROWS] for name, value in first.items()}
