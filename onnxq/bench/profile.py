"""Milliseconds of every kernel that the runtime executes, from its own profile.

Several models are profiled in turns, so that whatever else the machine does meets all of them alike. A kernel's time is
the mean over the faster half of its runs: the profile counts whole microseconds, which a mean over many runs resolves,
and what is slow is slow for another reason than the kernel.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from onnxq import graph
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Feeds

WARM_UP, LEAST_RUNS, MOST_RUNS = 3, 12, 200
_END = "_kernel_time"


@dataclass(frozen=True)
class Kernel:
    """One node of the graph that the runtime executes.

    Attributes:
        op_type: Its operator, "QLinearConv", ...
        ms: Milliseconds per run of the model.
    """

    op_type: str
    ms: float


def profiles(
    models: Sequence[graph.Model | Path], feeds: Feeds, config: SessionConfig, *, seconds: float = 0.5
) -> list[Mapping[str, Kernel]]:
    """The kernels of each model by the name that the runtime gives them.

    Args:
        models: They take the same inputs.
        feeds: One run's rows.
        config: Provider, threads and optimisation.
        seconds: Time per model, after `LEAST_RUNS` runs.
    """
    with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
        sessions = [
            Session(model, replace(config, profile=str(Path(folder) / f"profile{index}")))
            for index, model in enumerate(models)
        ]
        runs, began = 0, time.perf_counter()
        while runs < WARM_UP + LEAST_RUNS or (
            runs < WARM_UP + MOST_RUNS and time.perf_counter() - began < seconds * len(models)
        ):
            for session in sessions:
                session.run(feeds)
            runs += 1
        files = [session.end_profiling() for session in sessions]
        return [_kernels(json.loads(file.read_text(encoding="utf-8")), runs) for file in files]


def _kernels(events: Sequence[Mapping[str, object]], runs: int) -> dict[str, Kernel]:
    """Events of `runs` runs; a node in the body of a loop has several in each."""
    times: dict[str, list[float]] = {}
    operators: dict[str, str] = {}
    for event in events:
        name, took, args = str(event.get("name")), event.get("dur"), event.get("args")
        if event.get("cat") != "Node" or not name.endswith(_END):
            continue
        assert isinstance(took, int | float)
        assert isinstance(args, Mapping)
        name = name.removesuffix(_END)
        times.setdefault(name, []).append(took / 1e3)
        operators[name] = str(args.get("op_name", ""))
    return {name: Kernel(operators[name], _typical(found) * len(found) / runs) for name, found in times.items()}


def _typical(times: Sequence[float]) -> float:
    faster = np.sort(times)[: (len(times) + 1) // 2]
    return float(np.mean(faster))
