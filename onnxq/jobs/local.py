"""Jobs in processes of this machine (loky's, which joblib brings), or in this very process."""

from __future__ import annotations

import signal
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from onnxq.jobs.task import A, Failed, Function, Lost, R, Task, answered

THREADS = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class Local:
    """Processes that read the tasks' files where they are; they are started with the first job.

    Args:
        workers: Their number; 1 works in this process.
    """

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._pool: Any = None
        self.ahead = 1 if workers == 1 else 2 * workers

    def __enter__(self) -> Local:
        """Nothing yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the processes; in the middle of their jobs if there was an error."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, kill_workers=kind is not None)
            self._pool = None

    def submit(self, function: Function[A, R], task: Task[A]) -> Future[Any]:
        """Hand a job out."""
        if self._workers == 1:
            done: Future[R | Failed] = Future()
            done.set_result(answered(function, task.argument, task.folder))
            return done
        if self._pool is None:
            from joblib.externals.loky import ProcessPoolExecutor

            self._pool = ProcessPoolExecutor(self._workers, initializer=_ignore_interrupts, env=THREADS)
        try:
            future: Future[Any] = self._pool.submit(answered, function, task.argument, task.folder)
        except BrokenProcessPool as error:
            future = Future()
            future.set_exception(error)
        return future

    def answer(self, future: Future[Any]) -> Any:
        """The result of a finished job; the death of one process ends all of them, so all their jobs are lost."""
        try:
            return future.result()
        except BrokenProcessPool as error:
            if self._pool is not None:
                self._pool.shutdown(wait=True, kill_workers=True)
                self._pool = None
            raise Lost("a process ended by itself, or was killed") from error


def _ignore_interrupts() -> None:
    """Ctrl-C reaches all processes of a terminal; the one that gave the jobs out ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
