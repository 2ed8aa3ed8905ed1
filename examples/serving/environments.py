"""What each example needs, made in a folder of the user's, and the command that runs its exercise.

Nothing is written into the checkout: Node's folders are copied first. What a machine lacks raises `MissingError`, with
what it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnxruntime as ort

HERE = Path(__file__).resolve().parent
INSTALL_LIMIT_S = 1800
HEADERS = ("/usr/include/onnxruntime", "/usr/local/include/onnxruntime", "/usr/local/include")
HEADER_WHEEL = "amd-quark"  # a small wheel that carries onnxruntime's C++ headers, version 1.17


class MissingError(Exception):
    """Something that this machine does not have."""


@dataclass(frozen=True)
class Command:
    """How to run an exercise; the job's and the output's folder are appended unless `complete`."""

    argv: Sequence[str]
    cwd: Path = HERE
    env: Mapping[str, str] = field(default_factory=dict)
    complete: bool = False


@dataclass(frozen=True)
class Place:
    """Where an example may work.

    Attributes:
        work: Folder of the environments; they are kept for the next time.
        job: The job's folder.
        said: The content of its job.json.
        out: Where the exercise writes.
        headers: Folder of onnxruntime_cxx_api.h, or None to look for it.
    """

    work: Path
    job: Path
    said: Mapping[str, object]
    out: Path
    headers: Path | None


@dataclass(frozen=True)
class Example:
    """One way of serving.

    Attributes:
        name: Its folder.
        same_build: It runs the very onnxruntime build of this interpreter, so outputs must be the same bits.
        prepare: Makes what it needs and returns the command.
    """

    name: str
    same_build: bool
    prepare: Callable[[Place], Command]


def _tool(*names: str) -> str:
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise MissingError(f"{' or '.join(names)} is not installed")
    return found


def _install(argv: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None) -> None:
    try:
        done = subprocess.run(
            argv, cwd=cwd, env={**os.environ, **(env or {})}, capture_output=True, text=True, timeout=INSTALL_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        raise MissingError(f"`{' '.join(argv[:4])} ...` took longer than {INSTALL_LIMIT_S} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "rror" in line] or done.stderr.splitlines()
        raise MissingError(f"`{' '.join(argv[:4])} ...` failed: {lines[-1] if lines else done.returncode}")


def _virtual_environment(place: Place, example: str) -> str:
    """A Python environment with the example's requirements and this interpreter's onnxruntime; its python."""
    folder, marker = place.work / example, place.work / example / f"ready-{ort.__version__}"
    python = folder / "bin" / "python"
    if not marker.exists():
        _install([sys.executable, "-m", "venv", "--clear", str(folder)], place.work)
        wanted = ["-r", str(HERE / example / "requirements.txt"), f"onnxruntime=={ort.__version__}"]
        _install([str(python), "-m", "pip", "install", "-q", *wanted], place.work)
        marker.touch()
    return str(python)


def _node_folder(place: Place, example: str) -> Path:
    """A copy of the example's folder with its packages installed."""
    folder = place.work / example
    shutil.copytree(HERE / example, folder, dirs_exist_ok=True)
    if not (folder / "node_modules" / ".package-lock.json").exists():
        # onnxruntime-node would download its CUDA part when it is installed; the processor's part is in the package.
        _install([_tool("npm"), "install", "--no-audit", "--no-fund"], folder, {"ONNXRUNTIME_NODE_INSTALL": "skip"})
    return folder


def python_session(place: Place) -> Command:
    """This interpreter."""
    return Command([sys.executable, "-m", "python_session.exercise"])


def fastapi_server(place: Place) -> Command:
    """A virtual environment."""
    return Command([_virtual_environment(place, "fastapi_server"), "-m", "fastapi_server.exercise"])


def triton_server(place: Place) -> Command:
    """A virtual environment; nvidia-pytriton's wheel holds the Triton server (x86-64 Linux)."""
    return Command([_virtual_environment(place, "triton_server"), "-m", "triton_server.exercise"])


def node_server(place: Place) -> Command:
    """Node.js and the package onnxruntime-node."""
    node = _tool("node")
    return Command([node, "exercise.js"], _node_folder(place, "node_server"))


def browser_page(place: Place) -> Command:
    """Chromium and the package onnxruntime-web."""
    _tool("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return Command([sys.executable, "exercise.py"], _node_folder(place, "browser_page"))


def _headers(place: Place) -> Path:
    for folder in [place.headers] if place.headers else map(Path, HEADERS):
        if (folder / "onnxruntime_cxx_api.h").exists():
            return folder
    if place.headers:
        raise MissingError(f"onnxruntime_cxx_api.h is not in {place.headers}")
    target = place.work / "cpp_program" / "include"
    if not (target / "onnxruntime_cxx_api.h").exists():
        wheels = place.work / "cpp_program" / "wheels"
        download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), HEADER_WHEEL]
        _install(download, place.work)
        target.mkdir(parents=True, exist_ok=True)
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            for name in wheel.namelist():
                if "/onnxruntime/core/session/" in name and name.endswith(".h"):
                    (target / Path(name).name).write_bytes(wheel.read(name))
    return target


def cpp_program(place: Place) -> Command:
    """A compiler, headers, and the library that is inside Python's onnxruntime wheel."""
    compiler = _tool("g++", "clang++")
    library = next((Path(ort.__file__).parent / "capi").glob("libonnxruntime.so.1*"), None)
    if library is None:
        raise MissingError("this onnxruntime wheel has no libonnxruntime.so")
    include = _headers(place)
    folder = place.work / "cpp_program"
    link = folder / "lib" / "libonnxruntime.so.1"  # the name that the library says it has
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(library)
    program = folder / "exercise"
    libraries = [str(link), f"-Wl,-rpath,{link.parent}"]
    source = str(HERE / "cpp_program" / "exercise.cpp")
    _install([compiler, "-std=c++17", "-O2", f"-I{include}", source, "-o", str(program), *libraries], folder)
    said = place.said
    numbers = [str(said[key]) for key in ("slices", "calls")]
    shape = [str(axis) for axis in said["shape"]]  # type: ignore[attr-defined]
    models = [str(said["float"]), str(said["int8"]), str(place.job / "rows.f32")]
    return Command([str(program), *models, *numbers, str(place.out), *shape], folder, complete=True)


EXAMPLES = (
    Example("python_session", True, python_session),
    Example("fastapi_server", True, fastapi_server),
    Example("triton_server", True, triton_server),
    Example("cpp_program", True, cpp_program),
    Example("node_server", False, node_server),
    Example("browser_page", False, browser_page),
)
