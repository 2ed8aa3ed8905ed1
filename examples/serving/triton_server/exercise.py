"""Ask two Triton servers, of the float and of the quantized file, with the stock client.

cd examples/serving && python -m triton_server.exercise JOB OUT
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime as ort
from slices import Job, exercise
from tritonclient.http import InferenceServerClient, InferInput

START_S = 120.0


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment() -> dict[str, str]:
    """Triton's python backend looks for libpython where the interpreter has it."""
    paths = [sysconfig.get_config_var("LIBDIR"), os.environ.get("LD_LIBRARY_PATH")]
    return {**os.environ, "LD_LIBRARY_PATH": os.pathsep.join(filter(None, paths))}


def _ready(client: InferenceServerClient) -> bool:
    try:
        return bool(client.is_model_ready("classifier"))
    except OSError:  # not listening yet
        return False


@contextmanager
def server(model: str, log: Path) -> Iterator[InferenceServerClient]:
    """Triton in its own process; a client of it, once the model is ready."""
    port = free_port()
    argv = [sys.executable, "-m", "triton_server.serve", model, str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            argv, cwd=Path(__file__).parents[1], env=environment(), stdout=output, stderr=subprocess.STDOUT
        )
    client = InferenceServerClient(f"127.0.0.1:{port}")
    try:
        until = time.monotonic() + START_S
        while not _ready(client):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"Triton did not start: {log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.3)
        yield client
    finally:
        client.close()
        process.terminate()
        process.wait(60)


class Asks:
    """A client, called like the classifier itself."""

    def __init__(self, client: InferenceServerClient) -> None:
        self._client = client

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """Scores of float32 rows."""
        tensor = InferInput("rows", list(rows.shape), "FP32")
        tensor.set_data_from_numpy(rows)
        return self._client.infer("classifier", [tensor]).as_numpy("scores")


def main() -> None:
    """Start both servers, compare the answers, measure."""
    job = Job.from_argv()
    with ExitStack() as stack:
        clients = {
            side: stack.enter_context(server(model, job.out / f"triton_{side}.log"))
            for side, model in job.models.items()
        }
        about = next(iter(clients.values())).get_server_metadata()
        runtime = (
            f"Triton {about['version']} in nvidia-pytriton {version('nvidia-pytriton')}, "
            f"tritonclient {version('tritonclient')}, onnxruntime {ort.__version__}"
        )
        exercise(job, {side: Asks(client) for side, client in clients.items()}, runtime)


if __name__ == "__main__":
    main()
