"""Build the virtual environments that `field.py` runs the rivals in, one each, with pinned packages.

    python benchmarks/rival_environments.py --environments DIR [NAME ...]

DIR/NAME gets a venv of this Python and `installed.json`, the version of every package in it, or `failed.json`, the
message of what went wrong; what has `installed.json` is left alone. pip installs from wherever it is set up to: let it
find a build of torch for the CPU (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL), or gigabytes of CUDA libraries come along.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from process import Finished, run


@dataclass(frozen=True)
class Environment:
    """What is installed: pinned requirements, and those that are installed without what they depend on."""

    requirements: tuple[str, ...]
    alone: tuple[str, ...] = ()


TORCH = "torch==2.13.0"
ENVIRONMENTS: Mapping[str, Environment] = {
    "aimet": Environment(("aimet-onnx==2.42.0", "onnx==1.23.2", "onnxruntime==1.31.1", TORCH)),
    "nncf": Environment(("nncf==3.4.0", "onnx==1.21.0", "onnxruntime==1.31.1")),
    "quark": Environment(("amd-quark==0.13", "onnx==1.22.0", "onnxruntime==1.31.1", TORCH)),
    "inc": Environment(
        ("neural-compressor==2.6", "onnx==1.16.2", "onnxruntime==1.18.1", "numpy==1.26.4"),
        alone=("six==1.17.0",),  # which it imports without saying so
    ),
    "modelopt": Environment(
        (
            *("onnx==1.21.0", "onnxruntime==1.24.4", TORCH, "onnx-graphsurgeon==0.6.1", "onnxconverter-common==1.16.0"),
            *("onnxslim==0.1.98", "onnxscript==0.7.2", "polygraphy==0.53.6", "pulp==3.3.2", "pydantic==2.14.3"),
            *("omegaconf==2.4.0", "lief==1.0.0", "cppimport==26.4.17", "ninja==1.13.2", "safetensors==0.8.0"),
            *("nvidia-ml-py==13.615.71", "scipy==1.17.1", "rich==15.0.0", "tqdm==4.70.1", "regex==2026.11.15"),
        ),
        alone=("nvidia-modelopt==0.47.0",),  # it asks for onnxruntime-gpu and cupy
    ),
    "espppq": Environment(("esp-ppq==1.3.12", "onnxruntime==1.31.1", TORCH)),
}


def python(folder: Path, name: str) -> Path:
    """The interpreter of an environment."""
    return folder / name / "bin" / "python"


def state(folder: Path, name: str) -> tuple[dict[str, str], str]:
    """The packages of an environment and an empty message, or none and why it cannot be used."""
    installed, failed = folder / name / "installed.json", folder / name / "failed.json"
    if installed.is_file():
        return json.loads(installed.read_text(encoding="utf-8")), ""
    if failed.is_file():
        return {}, f"environment not built: {json.loads(failed.read_text(encoding='utf-8'))}"
    return {}, "environment not built: run rival_environments.py"


def build(folder: Path, name: str, timeout_s: float) -> str:
    """Make one environment; the message of the step that failed, or nothing."""
    place, wanted = folder / name, ENVIRONMENTS[name]
    shutil.rmtree(place, ignore_errors=True)
    log = folder / "logs" / name
    pip = [str(python(folder, name)), "-m", "pip", "install", "--quiet", "--no-compile"]
    steps = [[sys.executable, "-m", "venv", str(place)], [*pip, *wanted.requirements]]
    if wanted.alone:
        steps.append([*pip, "--no-deps", *wanted.alone])
    for step in steps:
        finished = run(step, log, timeout_s)
        if finished.status != 0:
            message = complaint(finished)
            place.mkdir(parents=True, exist_ok=True)
            (place / "failed.json").write_text(json.dumps(message) + "\n", encoding="utf-8")
            return message
    listed = run([str(python(folder, name)), "-m", "pip", "list", "--format", "json"], log, timeout_s)
    versions = {package["name"].lower(): package["version"] for package in json.loads(listed.stdout)}
    (place / "installed.json").write_text(json.dumps(versions, indent=1) + "\n", encoding="utf-8")
    return ""


def complaint(finished: Finished) -> str:
    """The last error line of pip, or the last line of all."""
    errors = [line for line in finished.stderr.splitlines() if line.startswith("ERROR")]
    return errors[-1][:300] if errors else finished.complaint


def main() -> None:
    """Build what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="folder for the environments")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default: all of {', '.join(ENVIRONMENTS)}")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds that one step may take")
    args = parser.parse_args()
    if unknown := set(args.names) - set(ENVIRONMENTS):
        parser.error(f"no environment {', '.join(sorted(unknown))}: there are {', '.join(ENVIRONMENTS)}")
    folder = args.environments.absolute()
    for name in args.names or ENVIRONMENTS:
        if state(folder, name)[0]:
            print(f"{name}: there already")
            continue
        print(f"{name}: {build(folder, name, args.timeout) or 'built'}", flush=True)


if __name__ == "__main__":
    main()
