"""Run one command as a child process and say what it cost.

The parent must stay small: Linux counts the memory of the parent that forked into the peak of its child, so
what the benchmark's main process imports uses the standard library only.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Cost:
    """What one child, with the children it waited for, used."""

    wall_s: float
    cpu_s: float
    peak_mb: float


@dataclass(frozen=True)
class Finished:
    """A child that ended: its exit status (negative: killed by that signal), output and cost."""

    status: int
    stdout: str
    stderr: str
    cost: Cost

    @property
    def complaint(self) -> str:
        """The last thing a failed child said, in one line."""
        lines = [line.strip() for line in (self.stderr or self.stdout).splitlines() if line.strip()]
        said = lines[-1] if lines else "no message"
        return f"{said[:300]} (exit {self.status})"


class ChildError(Exception):
    """A child ended with another status than 0, or printed no JSON."""


def run(argv: Sequence[str], log: Path, timeout_s: float = 3600, env: Mapping[str, str] | None = None) -> Finished:
    """Run `argv` to its end; its output is kept in `log`.out and `log`.err."""
    out, err = log.with_name(log.name + ".out"), log.with_name(log.name + ".err")
    log.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as stdout, err.open("wb") as stderr:
        began = time.perf_counter()
        child = subprocess.Popen(argv, stdout=stdout, stderr=stderr, env=env, start_new_session=True)
        timer = threading.Timer(timeout_s, os.killpg, (child.pid, signal.SIGKILL))
        timer.daemon = True
        timer.start()
        try:
            _, status, usage = os.wait4(child.pid, 0)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        finally:
            timer.cancel()
        wall = time.perf_counter() - began
    child.returncode = os.waitstatus_to_exitcode(status)  # Popen must not wait for it again
    cost = Cost(round(wall, 3), round(usage.ru_utime + usage.ru_stime, 3), round(usage.ru_maxrss / 1024, 1))
    late = f"\nstopped after {timeout_s:.0f} s" if wall >= timeout_s else ""
    return Finished(child.returncode, _read(out), _read(err) + late, cost)


def ask(argv: Sequence[str], log: Path, timeout_s: float = 3600) -> dict[str, Any]:
    """Run `argv` and return the JSON object on the last line of its stdout."""
    finished = run(argv, log, timeout_s)
    if finished.status != 0:
        raise ChildError(f"{shlex.join(Path(part).name for part in argv[1:3])}: {finished.complaint}")
    try:
        answer = json.loads(finished.stdout.splitlines()[-1])
    except (IndexError, json.JSONDecodeError) as error:
        raise ChildError(f"{Path(argv[1]).name}: no JSON on stdout") from error
    if not isinstance(answer, dict):
        raise ChildError(f"{Path(argv[1]).name}: JSON on stdout is no object")
    return answer


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
