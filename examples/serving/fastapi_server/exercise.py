"""Two servers, one of the float and one of the quantized file, under load in turns.

cd examples/serving && python -m fastapi_server.exercise JOB OUT
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import fastapi
import numpy as np
import onnxruntime as ort
import uvicorn
from slices import SIDES, Job, exercise

CLIENTS = 4  # connections that ask at the same time
TURNS, TURN_S = 6, 1.0  # of the load test, for each side
START_S = 60.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def server(model: str) -> Iterator[int]:
    """A server in its own process; the port, once it answers."""
    port = free_port()
    argv = [sys.executable, "-m", "uvicorn", "fastapi_server.app:app", "--port", str(port), "--log-level", "warning"]
    process = subprocess.Popen(argv, cwd=Path(__file__).parents[1], env={**os.environ, "MODEL": model})
    try:
        until = time.monotonic() + START_S
        while True:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit("the server did not start")
            try:
                socket.create_connection(("127.0.0.1", port), 0.2).close()
                break
            except OSError:
                time.sleep(0.05)
        yield port
    finally:
        process.terminate()
        process.wait(10)


class Client:
    """One connection that is kept open; called like the classifier itself."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port)

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Scores of float32 rows."""
        try:
            answer, body = self._post(rows)
        except (BrokenPipeError, ConnectionResetError, http.client.RemoteDisconnected):
            self._connection.close()  # the server closes connections that were idle for some seconds
            answer, body = self._post(rows)
        if answer.status != 200:
            raise SystemExit(f"HTTP {answer.status}: {body[:200]!r}")
        return np.asarray(json.loads(body)["scores"], np.float32)  # a float32 survives the way through JSON

    def _post(self, rows: np.ndarray) -> tuple[http.client.HTTPResponse, bytes]:
        headers = {"Content-Type": "application/octet-stream"}
        self._connection.request("POST", "/predict", rows.astype("<f4", copy=False).tobytes(), headers)
        answer = self._connection.getresponse()
        return answer, answer.read()


def load(port: int, row: np.ndarray, seconds: float) -> list[float]:
    """Milliseconds of every request of `CLIENTS` connections that ask as fast as they are answered."""
    until = time.perf_counter() + seconds
    found: list[list[float]] = [[] for _ in range(CLIENTS)]

    def ask(times: list[float]) -> None:
        client = Client(port)
        while time.perf_counter() < until:
            began = time.perf_counter()
            client(row)
            times.append(1e3 * (time.perf_counter() - began))

    threads = [threading.Thread(target=ask, args=(times,)) for times in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [value for times in found for value in times]


def load_test(ports: dict[str, int], row: np.ndarray) -> dict[str, dict[str, float]]:
    """Throughput and latency percentiles of both servers, loaded in turns."""
    times: dict[str, list[float]] = {side: [] for side in SIDES}
    for turn in range(TURNS):
        for side in SIDES if turn % 2 else SIDES[::-1]:
            times[side] += load(ports[side], row, TURN_S)
    found = {}
    for side in SIDES:
        cuts = statistics.quantiles(times[side], n=100)
        found[side] = {
            "requests_per_s": len(times[side]) / (TURNS * TURN_S),
            **{f"p{rank}_ms": cuts[rank - 1] for rank in (50, 90, 99)},
        }
    return found


def main() -> None:
    """Start both servers, compare the answers, measure."""
    job = Job.from_argv()
    with ExitStack() as stack:
        ports = {side: stack.enter_context(server(model)) for side, model in job.models.items()}
        predict = {side: Client(port) for side, port in ports.items()}
        loaded = load_test(ports, job.rows[:1])
        runtime = f"fastapi {fastapi.__version__}, uvicorn {uvicorn.__version__}, onnxruntime {ort.__version__}"
        exercise(job, predict, runtime, load=loaded)


if __name__ == "__main__":
    main()
