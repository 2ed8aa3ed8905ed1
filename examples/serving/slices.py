"""What the Python exercises share: one job, two servers of it, and calls that alternate between them.

A job is a folder that `run_all.py` writes: `job.json` (the two files, the shape of the rows, how much to measure) and
`rows.f32` (the rows as little-endian float32). An exercise leaves `float.f32` and `int8.f32` (the outputs, one row
after the other) and `times.json` in its own folder: for each side the median latencies of its slices, in ms.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

Predict = Callable[[np.ndarray], np.ndarray]
SIDES = ("float", "int8")


@dataclass(frozen=True)
class Job:
    """One job as an exercise sees it.

    Attributes:
        models: The float and the quantized file, by the names of `SIDES`.
        rows: float32 [rows, ...], fed one by one.
        slices: How many slices of each side are timed.
        calls: Calls per slice.
        out: Where the exercise writes.
    """

    models: dict[str, str]
    rows: np.ndarray
    slices: int
    calls: int
    out: Path

    @classmethod
    def from_argv(cls) -> Job:
        """The job of a command line `EXERCISE JOB_FOLDER OUT_FOLDER`."""
        folder, out = Path(sys.argv[1]), Path(sys.argv[2])
        said = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        rows = np.fromfile(folder / "rows.f32", "<f4").reshape(said["shape"])
        return cls({side: said[side] for side in SIDES}, rows, said["slices"], said["calls"], out)


def exercise(job: Job, predict: dict[str, Predict], runtime: str, **more: object) -> None:
    """Feed every row to both sides, then time them in turns, and write what came out."""
    for side in SIDES:
        outputs = [predict[side](row[None]) for row in job.rows]
        np.concatenate(outputs).astype("<f4", copy=False).tofile(job.out / f"{side}.f32")
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(job.slices):
        for side in SIDES if turn % 2 else SIDES[::-1]:
            predict[side](job.rows[:1])  # brings its weights back into the caches
            calls = []
            for call in range(job.calls):
                row = call % len(job.rows)
                began = time.perf_counter()
                predict[side](job.rows[row : row + 1])
                calls.append(1e3 * (time.perf_counter() - began))
            times[side].append(statistics.median(calls))
    document = {"runtime": runtime, **{f"{side}_ms": times[side] for side in SIDES}, **more}
    (job.out / "times.json").write_text(json.dumps(document), encoding="utf-8")
