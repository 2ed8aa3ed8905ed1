"""`sweep`: every model by every recipe, one job each, and one comparison of them all.

A job's result is kept beside its file, with the digest of everything that it depends on; the same sweep again takes
what is there. Latency is measured at the end, here, one model after the other: jobs that share a machine slow each
other.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from onnxq import bench, calibrate, graph, runtime
from onnxq.calibrate import Preprocess
from onnxq.calibrate.observe import has_free_rows
from onnxq.errors import EnvironmentFault, OnnxqError, TargetNotMet, UsageError
from onnxq.jobs import LOCAL, Failed, Task, open_backend, outcomes, require_backend
from onnxq.pipeline.result import Checks
from onnxq.pipeline.run import quantize
from onnxq.pipeline.score import evaluate
from onnxq.pipeline.staging import Place, companions_of, content_of, place_of, require_distinct, rows_of
from onnxq.pipeline.tuning import Workplace
from onnxq.recipe import Recipe, plain, resolve
from onnxq.report import quantize_document, to_json
from onnxq.types import Feeds, Log, Silence
from onnxq.types.sweep import Swept
from onnxq.version import __version__


@dataclass(frozen=True)
class Job:
    """One model by one recipe, for `quantize_one`.

    Attributes:
        model: The float model.
        recipe: What is done to it.
        rows: Calibration rows.
        labelled: Labelled rows, if there are any.
        preprocess: What is done to images.
        batch: Rows per run during calibration.
        output: Name of the file to make.
    """

    model: Place
    recipe: Recipe
    rows: Place
    labelled: Place | None
    preprocess: Preprocess | None
    batch: int | None
    output: str


@dataclass(frozen=True)
class Made:
    """What a job made: its document, and the files of the quantized model by their names."""

    document: Mapping[str, Any]
    files: Mapping[str, bytes]


@dataclass(frozen=True)
class Entry:
    """One job of a sweep on this side.

    Attributes:
        model: As it was given.
        recipe: Name of the recipe.
        settings: The recipe.
        rows: Calibration rows, as paths are given.
        labelled: Labelled rows; "" for none.
        target: File to write; its document stands beside it.
        digest: Of all that the result depends on; "" where that cannot be known.
    """

    model: Path
    recipe: str
    settings: Recipe
    rows: str
    labelled: str
    target: Path
    digest: str

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.model.name} by {self.recipe}"

    @property
    def notes(self) -> Path:
        """File of the document."""
        return self.target.with_suffix(".json")


def sweep(
    models: Sequence[Path],
    recipes: Sequence[str],
    data: str,
    folder: Path,
    *,
    labelled: str | None = None,
    preprocess: Preprocess | None = None,
    batch: int | None = None,
    workers: int = 0,
    backend: str = LOCAL,
    time_it: bool = True,
    log: Log = Silence(),
) -> tuple[Swept, ...]:
    """Quantize every model by every recipe.

    Args:
        models: Float files with distinct names.
        recipes: Names of presets, and TOML files.
        data: Calibration rows of all models; or a folder with rows of each under the model's name without its ending.
        folder: Gets MODEL.RECIPE.onnx and MODEL.RECIPE.json for each; made if it is not there.
        labelled: Labelled rows, likewise.
        preprocess: What is done to images.
        batch: Rows per run during calibration.
        workers: Jobs at a time; 0 for one per processor.
        backend: Where they run, see `onnxq.jobs.open_backend`.
        time_it: Measure latency on this machine.
        log: Progress.

    Returns:
        One entry per job, models outermost. A job that fails is one of them; the others go on.

    Raises:
        UsageError: Names clash, a preset is not known, or the backend cannot run rows from a function.
        InputError: A model, a recipe or rows are not there.
        EnvironmentFault: The folder cannot be written, or the backend is gone.
    """
    require_backend(backend)
    entries = _entries(models, recipes, data, labelled or "", folder, (preprocess, batch))
    log.stage(f"Quantizing {len(models)} models by {len(recipes)} recipes")
    found = {entry.name: swept for entry in entries if (swept := _known(entry)) is not None}
    if found:
        log.note(f"{len(found)} of {len(entries)} jobs were done before")
    missing = sorted((e for e in entries if e.name not in found), key=lambda e: -e.model.stat().st_size)
    by_name = {entry.name: entry for entry in missing}
    with tempfile.TemporaryDirectory(prefix="onnxq-") as scratch, open_backend(backend, workers) as workplace:
        tasks = _tasks(missing, None if backend == LOCAL else Path(scratch), preprocess, batch)
        for task, outcome in outcomes(workplace, quantize_one, tasks):
            entry = by_name[task.name]
            found[task.name] = swept = _finished(entry, outcome)
            log.step(f"{len(found)} of {len(entries)} jobs")
            log.note(f"{task.name}: {swept.error or f'wrote {entry.target}'}")
    if time_it:
        log.stage("Measuring latency")
        found = _timed(entries, found, preprocess, log)
    return tuple(found[entry.name] for entry in entries)


def quantize_one(job: Job, folder: Path) -> Made:
    """Do one job; files it needs are in `folder`."""
    began = time.monotonic()
    model, rows = job.model.found(folder), job.rows.found(folder)
    result = quantize(
        model, rows, job.recipe, preprocess=job.preprocess, batch=job.batch, checks=Checks(time_it=False),
        place=Workplace(workers=1),
    )  # fmt: skip
    if result.missed:
        raise TargetNotMet(result.missed)
    with tempfile.TemporaryDirectory(prefix="onnxq-") as scratch:
        target = result.save(Path(scratch) / job.output)
        score = None
        if job.labelled is not None:
            given = job.labelled.found(folder)
            score = evaluate(target, given, reference=model, preprocess=job.preprocess, batch=job.batch)
        files = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    summary = result.summary(evaluation=score, seconds=time.monotonic() - began)
    return Made(json.loads(to_json(quantize_document(summary))), files)


def _entries(
    models: Sequence[Path], recipes: Sequence[str], data: str, labelled: str, folder: Path, how: tuple[Any, ...]
) -> list[Entry]:
    for model in models:
        graph.require_readable(model)
    stems = [model.stem for model in models]
    require_distinct(stems, "models")
    settings = {given: resolve(given) for given in recipes}
    names = {given: Path(given).stem for given in recipes}
    require_distinct((names[given] for given in recipes), "recipes")
    for given, recipe in settings.items():
        if recipe.placement == "measured" or recipe.max_latency:
            raise UsageError(f"recipe {given} decides by the clock, and jobs slow each other: use it with `quantize`.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvironmentFault(f"{folder} cannot be made: {error.strerror or error}.") from error
    rows = rows_of(data, stems, "--data")
    scored = rows_of(labelled, stems, "--eval") if labelled else dict.fromkeys(stems, "")
    contents: dict[Path, str] = {}
    entries = []
    for model in models:
        files = [Path(path) for path in (rows[model.stem], scored[model.stem]) if path]
        known = all(path.exists() for path in files)
        for path in files if known else ():
            contents[path] = contents.get(path) or content_of([path])
        content = [content_of([model, *companions_of(model)]), *(contents.get(path) for path in files)]
        for given in recipes:
            text = f"{__version__} {runtime.version()} {content} {plain(settings[given])} {how}"
            digest = hashlib.sha256(text.encode()).hexdigest() if known else ""
            target = folder / f"{model.stem}.{names[given]}.onnx"
            entries.append(
                Entry(model, names[given], settings[given], rows[model.stem], scored[model.stem], target, digest)
            )
    return entries


def _tasks(
    entries: Sequence[Entry], folder: Path | None, preprocess: Preprocess | None, batch: int | None
) -> list[Task[Job]]:
    tasks = []
    for entry in entries:
        model = place_of(str(entry.model), companions_of(entry.model), folder)
        rows = place_of(entry.rows, (), folder)
        labelled = place_of(entry.labelled, (), folder) if entry.labelled else None
        places = (model, rows, labelled) if labelled is not None else (model, rows)
        job = Job(model, entry.settings, rows, labelled, preprocess, batch, entry.target.name)
        files = dict.fromkeys(name for place in places for name in place.files)
        tasks.append(Task(entry.name, job, folder or Path(), tuple(files)))
    return tasks


def _known(entry: Entry) -> Swept | None:
    """The result of an earlier run that did the very same."""
    with suppress(OSError, ValueError):
        stored = json.loads(entry.notes.read_text(encoding="utf-8"))
        written = graph.file_digest(entry.target)
        if entry.digest and stored.get("job") == {"depends_on": entry.digest, "output_sha256": written}:
            return Swept(str(entry.model), entry.recipe, stored, known=True)
    return None


def _finished(entry: Entry, outcome: Made | Failed) -> Swept:
    if isinstance(outcome, Failed):
        error = outcome.error
        if isinstance(error, OnnxqError):
            return Swept(str(entry.model), entry.recipe, None, str(error), error.exit_code)
        return Swept(str(entry.model), entry.recipe, None, f"internal error: {type(error).__name__}: {error}", 1)
    target = entry.target
    try:
        for name, content in sorted(outcome.files.items(), reverse=True):
            with graph.atomic_path(target.with_name(name)) as temporary:
                temporary.write_bytes(content)
    except OSError as error:
        raise EnvironmentFault(f"{target} cannot be written: {error.strerror or error}.") from error
    job = {"depends_on": entry.digest, "output_sha256": graph.file_digest(target)}
    document = {**outcome.document, "source": str(entry.model), "output": str(target), "job": job}
    _write(entry.notes, document)
    return Swept(str(entry.model), entry.recipe, document)


def _write(path: Path, document: Mapping[str, Any]) -> None:
    try:
        with graph.atomic_path(path) as temporary:
            temporary.write_text(to_json(document) + "\n", encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"{path} cannot be written: {error.strerror or error}.") from error


def _timed(
    entries: Sequence[Entry], found: Mapping[str, Swept], preprocess: Preprocess | None, log: Log
) -> dict[str, Swept]:
    """The same with latencies: a model's files are called in turns."""
    timed = dict(found)
    for model in dict.fromkeys(entry.model for entry in entries):
        done = [entry for entry in entries if entry.model == model and found[entry.name].document is not None]
        if not done:
            continue
        log.step(model.name)
        paths = [path.resolve() for path in (model, *(entry.target for entry in done))]
        plain, *quick = bench.measure(
            paths, feeds=_one(model, done[0].rows, preprocess), seconds=0.2 * len(paths), min_rounds=7
        )
        for entry, latency in zip(done, quick, strict=True):
            document = dict(found[entry.name].document or {})
            ratio = None if latency.ratio is None else asdict(latency.ratio)
            figures = {"latency": [asdict(plain), asdict(latency)], "latency_ratio": ratio}
            document["verdict"] = {**document["verdict"], **figures}
            _write(entry.notes, document)
            timed[entry.name] = replace(found[entry.name], document=document)
    return timed


def _one(model: Path, rows: str, preprocess: Preprocess | None) -> Feeds:
    """One row, or the batch that the model fixes."""
    session = runtime.Session(model)
    feeds = next(iter(calibrate.open_data(rows, session.inputs, preprocess=preprocess, samples=1)))
    return {name: value[:1] for name, value in feeds.items()} if has_free_rows(session) else feeds
