"""Open the page in headless Chromium; the page posts what it found back to a small server.

cd examples/serving/browser_page && npm install && python exercise.py JOB OUT
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

HERE = Path(__file__).resolve().parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
RESULTS = ("float.f32", "int8.f32", "times.json", "error.txt")
LIMIT_S = 300.0


class Handler(SimpleHTTPRequestHandler):
    """The page and its packages, the job under /job/, and what the page posts under /result/."""

    extensions_map: ClassVar[dict[str, str]] = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def __init__(self, *args: object, job: Path, out: Path, done: threading.Event) -> None:
        self._files, self._out, self._done = _job_files(job), out, done
        super().__init__(*args, directory=str(HERE))

    def translate_path(self, path: str) -> str:
        """The job's own files by name; everything else from the page's folder."""
        name = path.partition("?")[0]
        return str(self._files[name]) if name in self._files else super().translate_path(path)

    def end_headers(self) -> None:
        """Isolation gives the page a clock of 5 microseconds instead of 100."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        super().end_headers()

    def do_POST(self) -> None:
        """Keep a result."""
        name = self.path.rpartition("/")[2]
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if name in RESULTS:
            (self._out / name).write_bytes(body)
        self.send_response(204)
        self.end_headers()
        if name in RESULTS[2:]:
            self._done.set()

    def log_message(self, *args: object) -> None:
        """Nothing."""


def _job_files(job: Path) -> dict[str, Path]:
    said = json.loads((job / "job.json").read_text(encoding="utf-8"))
    models = {f"/job/{side}.onnx": Path(said[side]) for side in ("float", "int8")}
    return {"/job/job.json": job / "job.json", "/job/rows.f32": job / "rows.f32", **models}


def main() -> None:
    """Serve, browse, wait for the result."""
    job, out = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit("no Chromium or Chrome found")
    done = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, job=job, out=out, done=done))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", f"--user-data-dir={profile}"]
        url = f"http://127.0.0.1:{server.server_port}/page.html"
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen([browser, *flags, url], **quiet)
        try:
            finished = done.wait(LIMIT_S)
        finally:
            process.terminate()
            process.wait(20)
            server.shutdown()
    if not finished:
        raise SystemExit(f"the page did not finish within {LIMIT_S:g} s")
    if (out / "error.txt").exists():
        raise SystemExit((out / "error.txt").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
