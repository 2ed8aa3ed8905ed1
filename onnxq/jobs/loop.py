"""The one loop behind all backends: hand out, collect, and run again what was lost with its worker."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

from onnxq.errors import EnvironmentFault
from onnxq.jobs.task import A, Backend, Failed, Function, Lost, R, Task

ALONE = 2
"""Attempts that a lost job gets by itself. Which job ended a worker is not known while several run, so the first loss
of each counts against none."""


def outcomes(
    backend: Backend, function: Function[A, R], tasks: Iterable[Task[A]]
) -> Iterator[tuple[Task[A], R | Failed]]:
    """Run a function over tasks; each outcome is handed out as soon as it is there, so that it can be kept.

    Args:
        backend: Where they run.
        function: Pure, and importable on the workers.
        tasks: Taken in their order, a few more than can run at once; so the largest should come first, and files may
            be made when their task is asked for.

    Yields:
        A task, and its result or what it raised.

    Raises:
        EnvironmentFault: The backend is gone.
    """
    fresh, again = iter(tasks), deque[Task[A]]()
    running: dict[Future[Any], Task[A]] = {}
    losses: Counter[int] = Counter()
    while True:
        if not again:
            _fill(backend, function, fresh, running)
        elif not running:
            task = again.popleft()
            running[backend.submit(function, task)] = task
        if not running:
            return
        done, _ = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            task = running.pop(future)
            try:
                yield task, backend.answer(future)
            except Lost as error:
                losses[id(task)] += 1
                if losses[id(task)] > ALONE:
                    yield task, Failed(_given_up(task, error))
                else:
                    again.append(task)


def results(backend: Backend, function: Function[A, R], tasks: Iterable[Task[A]]) -> Iterator[tuple[Task[A], R]]:
    """The same as `outcomes`; what a job raises is raised here."""
    for task, outcome in outcomes(backend, function, tasks):
        if isinstance(outcome, Failed):
            raise outcome.error
        yield task, outcome


def _fill(
    backend: Backend, function: Function[A, R], fresh: Iterator[Task[A]], running: dict[Future[Any], Task[A]]
) -> None:
    while len(running) < backend.ahead:
        task = next(fresh, None)
        if task is None:
            return
        running[backend.submit(function, task)] = task


def _given_up(task: Task[A], error: Lost) -> EnvironmentFault:
    return EnvironmentFault(f"{task.name}: its worker died every time ({error}); it may need more memory.")
