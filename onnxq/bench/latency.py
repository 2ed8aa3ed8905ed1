"""Latency of models side by side.

The models of one setting are called in turns, in a new random order each round, so that whatever else the
machine does meets all of them alike; what is compared is the ratio within a round, not the averages. The
garbage collector rests while the clock runs.
"""

from __future__ import annotations

import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from onnxq import runtime
from onnxq.bench.inputs import fixed_batch, make_feeds, merge_specs
from onnxq.bench.stats import ratio_interval
from onnxq.errors import UsageError
from onnxq.types import Feeds, InputSpec, Latency

MAX_ROUNDS = 10_000
"""More rounds than this only make the raw samples longer."""
FIRST_RUN_SECONDS = 300.0
"""A model whose first run takes longer is given up: a loop in it may never end."""
_SHORT_NAMES = {full: short for short, full in runtime.PROVIDERS.items()}
_LOOK = runtime.SessionConfig(threads=1, optimize="off")


@dataclass(frozen=True)
class _Setting:
    provider: str
    threads: int
    batch: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}" if self.threads else "default threads"
        return f"{self.provider}, {threads}, batch {self.batch}"


def measure(
    models: Sequence[Path],
    *,
    providers: Sequence[str] = ("cpu",),
    threads: Sequence[int] = (1,),
    batches: Sequence[int] = (1,),
    shapes: Mapping[str, Sequence[int]] | None = None,
    feeds: Feeds | None = None,
    seconds: float = 3.0,
    min_rounds: int = 10,
    warmup: int = 3,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> tuple[Latency, ...]:
    """Time every model in every setting; the first model is what the others are compared with.

    Args:
        models: Files that take the same inputs.
        providers: Execution providers, "cpu", "cuda", ...
        threads: Numbers of intra-op threads; 0 leaves it to the runtime.
        batches: Rows per call. Models whose batch is fixed run with that one only, and `progress` is told.
        shapes: Sizes of free axes by input.
        feeds: Real rows; without them inputs are random.
        seconds: Time per model and setting.
        min_rounds: Rounds to run even if they take longer.
        warmup: Rounds that are not counted, at least one.
        seed: Of the order of calls, of random inputs and of the bootstrap.
        progress: Receives one line per setting, and notes.

    Returns:
        Setting by setting (providers outermost), one entry per model in the order given.

    Raises:
        UsageError: The models cannot be compared, or an input's shape is not known.
        EnvironmentFault: A provider is not there.
        UnsupportedError: A model does not finish its first run within `FIRST_RUN_SECONDS`.
    """
    tell = progress or (lambda line: None)
    _check(models, providers, threads, batches)
    specs = merge_specs({str(path): runtime.Session(path, _LOOK).inputs for path in models})
    found: list[Latency] = []
    sizes = _batches(specs, batches, tell)
    inputs = {size: make_feeds(specs, size, shapes=shapes, feeds=feeds, seed=seed) for size in sizes}
    for provider in providers:
        ran_on = [_ran_on(path, provider, inputs[sizes[0]]) for path in models]
        for setting in (_Setting(provider, count, size) for count in threads for size in sizes):
            tell(f"{setting}: timing {len(models)} model{'s' if len(models) > 1 else ''}")
            times = _time(models, setting, inputs[setting.batch], (seconds, min_rounds, warmup), seed)
            found += _summarise(models, setting, ran_on, times, seed)
    return tuple(found)


def _check(models: Sequence[Path], providers: Sequence[str], threads: Sequence[int], batches: Sequence[int]) -> None:
    if not models:
        raise UsageError("there is no model to measure.")
    if any(count < 0 for count in threads):
        raise UsageError(f"a number of threads cannot be negative: {min(threads)}.")
    if any(size < 1 for size in batches):
        raise UsageError(f"a batch has at least one row, not {min(batches)}.")
    for provider in providers:
        runtime.require_provider(provider)


def _batches(specs: Sequence[InputSpec], wanted: Sequence[int], tell: Callable[[str], None]) -> tuple[int, ...]:
    fixed = fixed_batch(specs)
    if fixed is None:
        return tuple(dict.fromkeys(wanted))
    if tuple(wanted) != (fixed,):
        asked = ", ".join(map(str, wanted))
        tell(f"note: the model's inputs fix the batch at {fixed}; it is measured with that instead of {asked}.")
    return (fixed,)


def _ran_on(path: Path, provider: str, feeds: Feeds) -> tuple[str, ...]:
    """Providers of the nodes of one profiled run, the busiest first; a CPU session has no other to fall back to."""
    if provider == "cpu":
        return ("cpu",)
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        config = runtime.SessionConfig(provider, threads=1, profile=str(Path(folder) / "profile"))
        session = runtime.Session(path, config)
        session.run(feeds, limit_s=FIRST_RUN_SECONDS)
        events = json.loads(session.end_profiling().read_text(encoding="utf-8"))
    counts = Counter(
        event["args"]["provider"]
        for event in events
        if event.get("cat") == "Node" and event.get("args", {}).get("provider")
    )
    return tuple(
        _SHORT_NAMES.get(full, full.removesuffix("ExecutionProvider").lower()) for full, _ in counts.most_common()
    )


def _time(
    models: Sequence[Path], setting: _Setting, feeds: Feeds, limits: tuple[float, int, int], seed: int
) -> npt.NDArray[np.float64]:
    """Milliseconds, shape [rounds, models]."""
    seconds, min_rounds, warmup = limits
    config = runtime.SessionConfig(setting.provider, setting.threads, stop_spinning=len(models) > 1)
    sessions = [runtime.Session(path, config) for path in models]
    for session in sessions:
        session.run(feeds, limit_s=FIRST_RUN_SECONDS)
    for _ in range(warmup - 1):
        for session in sessions:
            session.run(feeds)
    rng = np.random.default_rng(seed)
    rounds: list[list[int]] = []
    left = int(seconds * 1e9) * len(models)
    with _no_garbage_collection():
        while len(rounds) < max(1, min_rounds) or (left > 0 and len(rounds) < MAX_ROUNDS):
            taken = [0] * len(sessions)
            for index in rng.permutation(len(sessions)):
                start = time.perf_counter_ns()
                sessions[index].run(feeds, limit_s=None)
                taken[index] = time.perf_counter_ns() - start
            left -= sum(taken)
            rounds.append(taken)
    return np.asarray(rounds, np.float64) / 1e6


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _summarise(
    models: Sequence[Path],
    setting: _Setting,
    ran_on: Sequence[tuple[str, ...]],
    times: npt.NDArray[np.float64],
    seed: int,
) -> list[Latency]:
    return [
        Latency(
            model=str(path),
            provider=setting.provider,
            ran_on=ran_on[index],
            threads=setting.threads,
            batch=setting.batch,
            samples_ms=tuple(times[:, index].tolist()),
            median_ms=float(np.median(times[:, index])),
            p95_ms=float(np.percentile(times[:, index], 95)),
            ratio=ratio_interval(times[:, index], times[:, 0], seed) if index else None,
        )
        for index, path in enumerate(models)
    ]
