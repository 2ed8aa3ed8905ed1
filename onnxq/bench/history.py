"""Two runs of `benchmark`, one of them from a file: what changed by more than the noise.

The medians of two runs differ by whatever else the machine did. The ratio to the first model of the same setting does
not, because it was paired within each run: where both runs have that model, it decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from onnxq.bench.stats import change_interval
from onnxq.errors import InputError
from onnxq.types import Change, Comparison, Interval, Latency

SCHEMA = 1


@dataclass(frozen=True)
class History:
    """A run of `benchmark` that was kept.

    Attributes:
        path: Its file.
        machine: Where it ran.
        latencies: What it found.
    """

    path: Path
    machine: Mapping[str, object]
    latencies: tuple[Latency, ...]

    def compare(self, now: Sequence[Latency], machine: Mapping[str, object], seed: int = 0) -> Comparison:
        """What changed since then.

        Args:
            now: The newer run.
            machine: Where that ran.
            seed: Of the bootstrap.
        """
        differs = tuple(
            f"{name} was {self.machine.get(name)}, is {value}"
            for name, value in machine.items()
            if self.machine.get(name) != value
        )
        found = changes(now, self.latencies, seed)
        return Comparison(str(self.path), differs, len(now) - len(found), found)


def read_history(path: Path) -> History:
    """The JSON document that `benchmark --save` or `--json` made.

    Raises:
        InputError: It cannot be read or is something else.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or (document.get("kind"), document.get("schema")) != ("benchmark", SCHEMA):
        raise InputError(f"{path} is not what `onnxq benchmark --save` writes (schema {SCHEMA}).")
    try:
        machine = dict(document["machine"])
        return History(path, machine, tuple(_latency(entry) for entry in document["latencies"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is not what `onnxq benchmark --save` writes: {error!r}.") from error


def _latency(entry: Mapping[str, Any]) -> Latency:
    samples = tuple(float(sample) for sample in entry["samples_ms"])
    if not samples or not all(np.isfinite(sample) and sample > 0 for sample in samples):
        raise ValueError("samples_ms holds something that is no time")
    return Latency(
        model=str(entry["model"]),
        provider=str(entry["provider"]),
        ran_on=tuple(map(str, entry["ran_on"])),
        threads=int(entry["threads"]),
        batch=int(entry["batch"]),
        samples_ms=samples,
        median_ms=float(entry["median_ms"]),
        p95_ms=float(entry["p95_ms"]),
        ratio=Interval(**entry["ratio"]) if entry["ratio"] is not None else None,
    )


def changes(now: Sequence[Latency], then: Sequence[Latency], seed: int = 0) -> tuple[Change, ...]:
    """What became of every model and setting that both runs have, in the order of this one.

    Models are the same if their paths are, or, where the older run has no such path, their file names.

    Args:
        now: This run.
        then: The older one.
        seed: Of the bootstrap.
    """
    found = []
    for entry in now:
        old = _same(entry, then)
        if old is None:
            continue
        mine, theirs = _relative(entry, now), _relative(old, then)
        first = None
        if mine is not None and theirs is not None and _same(_first(entry, now), [_first(old, then)]) is not None:
            first = change_interval(mine, theirs, seed)
        times = change_interval(entry.samples_ms, old.samples_ms, seed)
        where = (entry.model, entry.provider, entry.threads, entry.batch)
        found.append(Change(*where, old.median_ms, entry.median_ms, times, first))
    return tuple(found)


def _setting(entry: Latency) -> tuple[str, int, int]:
    return entry.provider, entry.threads, entry.batch


def _same(entry: Latency, others: Sequence[Latency]) -> Latency | None:
    """The same model in the same setting."""
    alike = [other for other in others if _setting(other) == _setting(entry)]
    exact = [other for other in alike if other.model == entry.model]
    named = [other for other in alike if PurePath(other.model).name == PurePath(entry.model).name]
    return next(iter(exact or named), None)


def _first(entry: Latency, run: Sequence[Latency]) -> Latency:
    """The first model of its setting."""
    return next(other for other in run if _setting(other) == _setting(entry))


def _relative(entry: Latency, run: Sequence[Latency]) -> np.ndarray | None:
    """Its paired ratios to the first model of its setting, None for that model itself."""
    first = _first(entry, run)
    if first is entry or len(first.samples_ms) != len(entry.samples_ms):
        return None
    return np.divide(entry.samples_ms, first.samples_ms)
