"""Jobs on a Dask cluster. Its scheduler gives the job of a lost worker to another one by itself."""

from __future__ import annotations

import pickle
from concurrent.futures import CancelledError, Future
from typing import Any

from distributed import Client
from distributed.scheduler import KilledWorker

from onnxq.errors import EnvironmentFault
from onnxq.jobs.parcels import Parcels
from onnxq.jobs.task import A, Failed, Function, Lost, R, Task, shipped, versions

PATIENCE = 20
"""Seconds until a scheduler that does not answer is given up."""


class Dask:
    """An existing cluster; files travel with the jobs.

    Args:
        address: "host:port" of the scheduler.
        workers: Jobs at a time; 0 for as many as the cluster has workers.

    Raises:
        EnvironmentFault: There is no such cluster, or nobody works there.
    """

    def __init__(self, address: str, workers: int) -> None:
        self._name = f"dask://{address}"
        try:
            self._client = Client(f"tcp://{address}", timeout=PATIENCE, set_as_default=False)
        except (OSError, TimeoutError, ValueError) as error:
            raise EnvironmentFault(f"{self._name} does not answer as a Dask scheduler does: {error}.") from error
        found = len(self._client.nthreads())
        if not found:
            self._client.close()
            raise EnvironmentFault(f"{self._name} has no workers; start some with: dask worker {address} --nthreads 1.")
        self._executor = self._client.get_executor(pure=False)
        self._parcels = Parcels(lambda content: self._client.scatter(content, hash=False))  # see `Parcels`
        self.ahead = 2 * (workers or found)

    def __enter__(self) -> Dask:
        """Nothing yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the cluster; jobs that nobody waits for any more are dropped there."""
        self._executor.shutdown(wait=False)
        self._client.close(timeout=PATIENCE)

    def submit(self, function: Function[A, R], task: Task[A]) -> Future[Any]:
        """Hand a job out."""
        try:
            contents, digests = self._parcels.of(task.folder, task.files)
            call = pickle.dumps((function, task.argument))
            future: Future[Any] = self._executor.submit(shipped, call, task.files, versions(), *contents)
        except (OSError, TimeoutError, RuntimeError) as error:
            raise EnvironmentFault(f"{self._name} is gone: {error}.") from error
        self._parcels.hold(future, digests)
        return future

    def answer(self, future: Future[Any]) -> Any:
        """The result of a finished job, or `Failed`."""
        self._parcels.release(future)
        try:
            return future.result()
        except CancelledError as error:
            if self._client.status != "running":
                raise EnvironmentFault(f"{self._name} is gone.") from error
            self._parcels.forget()
            raise Lost("its data went with a worker") from error
        except KilledWorker:
            return Failed(EnvironmentFault(f"{self._name} lost several workers over one job; it may need more memory."))
        except Exception as error:
            text = " ".join(str(error).split())
            raise EnvironmentFault(
                f"{self._name} cannot run jobs; its workers and scheduler need onnxq {versions()['onnxq']}: {text}"
            ) from error
