"""Jobs on a Ray cluster, through the server that it has for clients. Ray gives the job of a lost worker to another."""

from __future__ import annotations

import pickle
from concurrent.futures import Future
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayError, WorkerCrashedError

from onnxq.errors import EnvironmentFault
from onnxq.jobs.parcels import Parcels
from onnxq.jobs.task import A, Failed, Function, Lost, R, Task, shipped, versions

RETRIES = 3


class Ray:
    """An existing cluster; files travel with the jobs.

    Args:
        address: "host:port" of the server for clients (port 10001 unless the cluster says otherwise).
        workers: Jobs at a time; 0 for as many as the cluster has processors.

    Raises:
        EnvironmentFault: There is no such cluster.
    """

    def __init__(self, address: str, workers: int) -> None:
        self._name = f"ray://{address}"
        try:
            self._context = ray.init(self._name, logging_level="error", log_to_driver=False)
        except Exception as error:
            raise EnvironmentFault(f"{self._name} does not answer as a Ray cluster does: {error}.") from error
        self._remote = ray.remote(num_cpus=1, max_retries=RETRIES)(shipped)
        self._parcels = Parcels(ray.put)
        self._objects: dict[Future[Any], Any] = {}
        self.ahead = 2 * (workers or max(int(ray.cluster_resources().get("CPU", 1)), 1))

    def __enter__(self) -> Ray:
        """Nothing yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave the cluster; jobs that nobody waits for any more are dropped there."""
        for waiting in self._objects.values():
            ray.cancel(waiting, force=True)
        self._context.disconnect()

    def submit(self, function: Function[A, R], task: Task[A]) -> Future[Any]:
        """Hand a job out."""
        try:
            contents, digests = self._parcels.of(task.folder, task.files)
            call = pickle.dumps((function, task.argument))
            result = self._remote.remote(call, task.files, versions(), *contents)
        except (RayError, ConnectionError) as error:
            raise EnvironmentFault(f"{self._name} is gone: {error}.") from error
        future: Future[Any] = result.future()
        self._objects[future] = result
        self._parcels.hold(future, digests)
        return future

    def answer(self, future: Future[Any]) -> Any:
        """The result of a finished job, or `Failed`."""
        self._objects.pop(future, None)
        self._parcels.release(future)
        try:
            return future.result()
        except ObjectLostError as error:
            self._parcels.forget()
            raise Lost("its data went with a worker") from error
        except WorkerCrashedError:
            return Failed(EnvironmentFault(f"{self._name} lost several workers over one job; it may need more memory."))
        except ConnectionError as error:
            raise EnvironmentFault(f"{self._name} is gone: {error}.") from error
        except Exception as error:
            text = " ".join(str(error).split())
            raise EnvironmentFault(
                f"{self._name} cannot run jobs; its workers need onnxq {versions()['onnxq']}: {text}"
            ) from error
