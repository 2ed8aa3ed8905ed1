"""What a job is, and what runs it in a worker."""

from __future__ import annotations

import pickle
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from onnxq.errors import EnvironmentFault
from onnxq.version import __version__

A = TypeVar("A")
R = TypeVar("R")
Function = Callable[[A, Path], R]
"""A job's function, at the top level of a module: takes the argument and the folder that holds the task's files."""

DECIDING = ("numpy", "onnxruntime", "torch")
"""Packages whose version may change the last bits of a result."""
_ALONE = threading.RLock()
"""PyTorch's random numbers and thread count belong to the process, so a process does one job at a time (and the jobs
that this one makes of itself)."""


@dataclass(frozen=True)
class Task(Generic[A]):
    """One job: an argument and the files that go with it.

    Attributes:
        name: For messages.
        argument: Anything that pickles; it speaks of files by their names in the folder.
        folder: Where the files are on this machine.
        files: Their names, relative to the folder; they must not change before the job is done.
    """

    name: str
    argument: A
    folder: Path
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failed:
    """What a job that raised gives instead of a result."""

    error: Exception


class Lost(Exception):  # noqa: N818 - the job is lost, and comes again
    """The worker, or data on it, is gone; the job has to run again."""


class Backend(Protocol):
    """Where jobs run; a context manager, so that no worker outlives an interrupted run.

    Attributes:
        ahead: Jobs that may be handed out before the first of them is done.
    """

    ahead: int

    def __enter__(self) -> Backend:
        """Nothing yet."""
        ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Let go of the workers, at once if there was an error."""
        ...

    def submit(self, function: Function[A, R], task: Task[A]) -> Future[Any]:
        """Hand a job out."""
        ...

    def answer(self, future: Future[Any]) -> Any:
        """The result of a finished job, or `Failed`.

        Raises:
            Lost: The job must run again.
            EnvironmentFault: The whole backend is gone.
        """
        ...


def answered(function: Function[A, R], argument: A, folder: Path) -> R | Failed:
    """Run one job here; what it raises is part of the answer, so that every backend treats it alike."""
    try:
        with _ALONE:
            return function(argument, folder)
    except Exception as error:
        error.add_note(traceback.format_exc())
        return Failed(error)


def shipped(call: bytes, names: tuple[str, ...], wanted: Mapping[str, str], *contents: bytes) -> Any:
    """Run one job on a machine that has none of its files.

    Args:
        call: Its function and argument, pickled: only read where the versions are right, and by nobody on the way.
        names: Of its files, relative to the folder that they belong in.
        wanted: Versions on the machine that asks; see `versions`.
        contents: Of the files.

    Returns:
        The result, or `Failed`.
    """
    here = versions()
    if here != wanted:
        differing = [f"{name} {here.get(name)} instead of {version}" for name, version in wanted.items()
                     if here.get(name) != version] or ["more packages"]  # fmt: skip
        return Failed(EnvironmentFault(
            f"a worker has {', '.join(differing)}: results would depend on where a job runs; install the same there."
        ))  # fmt: skip
    function, argument = pickle.loads(call)
    with tempfile.TemporaryDirectory(prefix="onnxq-", ignore_cleanup_errors=True) as folder:
        for name, content in zip(names, contents, strict=True):
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return answered(function, argument, Path(folder))


@cache
def versions() -> Mapping[str, str]:
    """Versions of what decides about the bits of a result; packages that are not here are left out."""
    found = {"onnxq": __version__}
    for name in DECIDING:
        try:
            found[name] = version_of(name)
        except PackageNotFoundError:
            continue
    return found
