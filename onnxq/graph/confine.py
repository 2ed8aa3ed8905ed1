"""Native code that may crash, hang or eat memory on an odd model runs in a child process with limits.

A program reads one file and writes another. It is started by path and imports nothing of onnxq, so that a child costs
the start of Python and of what the program itself needs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Event

LAUNCHER = Path(__file__).with_name("launcher.py")
"""Sets the limits in the child, then runs the program."""
PATIENCE_S = 0.1
"""Seconds between looks at whether the child should be stopped."""
_GIB = 1 << 30


def run_confined(
    program: Path, source: Path, destination: Path, *, timeout_s: float, memory_bytes: int, stop: Event | None = None
) -> str | None:
    """Run `program SOURCE DESTINATION` in a child process to its end, or until a limit is reached.

    Args:
        program: A Python file; an exception in it is a failure with the exception's text.
        source: The file it reads.
        destination: The file it writes.
        timeout_s: Wall-clock seconds it may take.
        memory_bytes: Address space it may take.
        stop: Ends it early when it is set, by another thread.

    Returns:
        None, or what went wrong, as a predicate on one line: "took longer than 120 s", "crashed (SIGSEGV)".
    """
    # -P: the child's own folder must not shadow packages. Arenas count as address space, one per thread.
    command = [sys.executable, "-P", str(LAUNCHER), str(memory_bytes), str(timeout_s), str(program)]
    environment = {**os.environ, "MALLOC_ARENA_MAX": "2"}
    nothing = subprocess.DEVNULL
    with subprocess.Popen(
        [*command, str(source), str(destination)],
        stdin=nothing,
        stdout=nothing,
        stderr=subprocess.PIPE,
        env=environment,
    ) as child:
        said = _wait(child, timeout_s, stop)
    if said is None:
        return f"took longer than {timeout_s:g} s"
    errors = said.decode(errors="replace")
    if child.returncode == 0:
        return None if destination.is_file() else "wrote no model"
    if "bad_alloc" in errors or "out of memory" in errors or "Cannot allocate memory" in errors:
        return f"ran out of memory (limit {memory_bytes / _GIB:.1f} GiB)"
    if child.returncode < 0:
        return f"crashed ({_signal_name(-child.returncode)})"
    return f"failed ({_last_line(errors)})"


def _wait(child: subprocess.Popen[bytes], timeout_s: float, stop: Event | None) -> bytes | None:
    """What the child wrote to stderr; None where it had to be killed."""
    end = time.monotonic() + timeout_s
    try:
        while True:
            with suppress(subprocess.TimeoutExpired):
                written: bytes = child.communicate(timeout=PATIENCE_S)[1]
                return written
            if (stop is not None and stop.is_set()) or time.monotonic() > end:
                return None
    finally:
        child.kill()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines() or ["no message"]
    line = " ".join(lines[-1].split()).rstrip(".")
    return line if len(line) <= 200 else f"{line[:197]}..."
