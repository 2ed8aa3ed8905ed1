"""Backends by the names that users give: `local`, `dask://host:port`, `ray://host:port`."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Mapping

from onnxq.errors import EnvironmentFault, UsageError
from onnxq.jobs.task import Backend

LOCAL = "local"
PACKAGES: Mapping[str, str] = {"dask": "distributed", "ray": "ray"}
"""Kind of cluster -> the package that speaks to it, and the name of our extra that brings it."""
PATIENCE = 5.0
"""Seconds until an address that does not answer is given up."""


def require_backend(name: str) -> None:
    """Refuse a backend that is no use, before any work is done.

    Args:
        name: "local", "dask://host:port" or "ray://host:port".

    Raises:
        UsageError: It is none of these.
        EnvironmentFault: The package that speaks to it is missing, or nobody answers there.
    """
    kind, address = _parsed(name)
    if kind == LOCAL:
        return
    if importlib.util.find_spec(PACKAGES[kind]) is None:
        raise EnvironmentFault(f"{name} needs a package that is not installed: pip install 'onnxq[{kind}]'.")
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise EnvironmentFault(f"{name} cannot be reached: {error.strerror or error}.") from error


def open_backend(name: str = LOCAL, workers: int = 0) -> Backend:
    """Where jobs run; use it in a `with` statement.

    Args:
        name: "local" for processes of this machine, "dask://host:port" for a Dask scheduler, "ray://host:port" for
            the client server of a Ray cluster.
        workers: Jobs at a time; 0 for one per processor here, or as many as the cluster takes.

    Raises:
        UsageError: No such backend, or a negative number of workers.
        EnvironmentFault: The package that speaks to the cluster is missing, or nobody answers there.
    """
    if workers < 0:
        raise UsageError(f"--workers takes 0 or more, not {workers}.")
    require_backend(name)
    kind, address = _parsed(name)
    if kind == LOCAL:
        from joblib import cpu_count

        from onnxq.jobs.local import Local

        return Local(workers or cpu_count())
    if kind == "dask":
        from onnxq.jobs.dask import Dask

        return Dask(address, workers)
    from onnxq.jobs.ray import Ray

    return Ray(address, workers)


def _parsed(name: str) -> tuple[str, str]:
    kind, separator, address = name.partition("://")
    if name == LOCAL:
        return LOCAL, ""
    host, _, port = address.rpartition(":")
    if kind not in PACKAGES or not separator or not host or not port.isdigit() or int(port) > 65535:
        raise UsageError(f"--backend takes local, dask://host:port or ray://host:port, not {name!r}.")
    return kind, address
