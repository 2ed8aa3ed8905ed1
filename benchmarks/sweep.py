"""Every model of the ONNX backend test suites through `onnxq quantize`: none may break it.

    python benchmarks/sweep.py --out DIR [--every N] [--only PART] [--timeout S] [--memory-gb G] [-- OPTION ...]

The suites are those of the installed onnx package: node, simple, pytorch-converted and pytorch-operator. Node tests
feed weights as inputs, so a second variant (`baked`) of each model with several tensor inputs makes all but the first
of them initializers; models of operator sets that onnxq declines as too old have a variant of opset 13 (`raised`).
Every model is quantized on its own test data in a process of its own, with a limit of time and of memory, so that a
crash or a hang ends that process only. It must end as one of

    quantized   exit 0, every float output with 20 dB of signal to noise or 5 % of its range as the largest error
    untouched   exit 0 and equal outputs: nothing in it runs in integers
    declined    exit 3 or 4, one line, nothing written

and the inputs must be as before; anything else is a failure, kept with its message and its files. Options behind `--`
go to the command. DIR gets sweep.json; counts by operator and by opset are printed. The exit code is 1 where something
failed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from backend_cases import Array, Case, cases

LEAST_DB, MOST_ERROR = 20.0, 0.05
"""What is close: signal over noise of an output, or the largest error by its range."""
SAME = 1e-4
"""Largest error, by the range, of what was left in float: rewrites reorder additions."""
ENDS = ("quantized", "untouched", "declined", "failed")


@dataclass(frozen=True)
class Limits:
    """Seconds and bytes of address space that one model may take."""

    seconds: float = 120.0
    memory: int = 12 << 30


@dataclass(frozen=True)
class Ending:
    """What became of a model: one of ENDS, and why."""

    case: str
    op: str
    opset: int
    end: str
    message: str
    seconds: float


def run_all(
    selected: Iterable[Case],
    folder: Path,
    limits: Limits = Limits(),
    options: Sequence[str] = (),
    workers: int = 1,
) -> Iterator[Ending]:
    """Quantize each case in a process of its own, `workers` at a time; files of failed ones stay in `folder`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["onnxq.pipeline.run", "onnxq.report", "onnxq.cli.quantize", "sweep"])
    waiting = iter(selected)
    running: list[tuple[Case, Path, Any, float]] = []
    while True:
        while len(running) < workers and (case := next(waiting, None)) is not None:
            place = _write(case, folder)
            child = context.Process(target=_quantize, args=(place, tuple(options), limits.memory), daemon=False)
            child.start()
            running.append((case, place, child, time.monotonic()))
        if not running:
            return
        case, place, child, began = running.pop(0)
        child.join(max(0.0, began + limits.seconds - time.monotonic()))
        took = time.monotonic() - began
        end, message = _ending(place, child, limits)
        if end != "failed":
            shutil.rmtree(place)
        yield Ending(case.name, case.op, case.opset, end, message, round(took, 2))


def _write(case: Case, folder: Path) -> Path:
    place = folder / case.name.replace("/", "--")
    shutil.rmtree(place, ignore_errors=True)
    (place / "data").mkdir(parents=True)
    onnx.save(case.model, place / "model.onnx")
    for index, feeds in enumerate(case.feeds):
        plain = {name: array for name, array in feeds.items() if array.dtype.kind in "biuf"}
        np.savez(place / "data" / f"{index}.npz", **plain)  # type: ignore[arg-type]
    return place


def _ending(place: Path, child: Any, limits: Limits) -> tuple[str, str]:
    """What a finished (or hanging) process comes to."""
    if child.is_alive():
        child.kill()
        child.join()
        return "failed", f"hangs: longer than {limits.seconds:g} s"
    if child.exitcode != 0:
        tail = (place / "err").read_text(errors="replace").strip().splitlines() if (place / "err").exists() else []
        return "failed", f"died with exit code {child.exitcode}: {tail[-1] if tail else 'no message'}"
    found = json.loads((place / "ending.json").read_text())
    return found["end"], found["message"]


def _quantize(place: Path, options: Sequence[str], memory: int) -> None:
    """The child: run the command, judge what it left, and write the verdict to ending.json."""
    import resource

    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(place / name, os.O_CREAT | os.O_WRONLY), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.environ.pop("ONNXQ_DEBUG", None)
    try:
        end, message = judge(place, options)
    except BaseException as error:
        traceback.print_exc()
        end, message = "failed", f"judging it failed: {type(error).__name__}: {error}"
    (place / "ending.json").write_text(json.dumps({"end": end, "message": message}))


def judge(place: Path, options: Sequence[str]) -> tuple[str, str]:
    """Quantize place/model.onnx on place/data with the command line; returns the ending and why."""
    from onnxq.cli.main import _run

    before = _contents(place)
    target = place / "result.onnx"
    given = ["quantize", str(place / "model.onnx"), "--data", str(place / "data"), "-o", str(target)]
    code = _run([*given, "-q", "--no-timing", *options])
    sys.stdout.flush()
    sys.stderr.flush()
    lines = (place / "err").read_text(errors="replace").splitlines()
    errors = [line for line in lines if not line.startswith("warning:")]
    after = {name: bytes_ for name, bytes_ in _contents(place).items() if name != target.name}
    if after != before:
        return "failed", "files beside the result were changed, added or lost"
    if code in (3, 4):
        if target.exists():
            return "failed", f"exit {code}, and a file was written"
        if len(errors) != 1 or not errors[0].startswith("onnxq: error: "):
            return "failed", f"exit {code} with {len(errors)} lines: {' | '.join(errors)[:300]}"
        return "declined", errors[0].removeprefix("onnxq: error: ")
    if code != 0 or not target.exists():
        return "failed", f"exit {code}: {' | '.join(errors)[-600:]}"
    return _compared(place / "model.onnx", target, place / "data")


def _contents(place: Path) -> dict[str, bytes]:
    files = [file for file in place.rglob("*") if file.is_file() and file.name not in ("out", "err")]
    return {str(file.relative_to(place)): file.read_bytes() for file in files}


def _compared(source: Path, result: Path, data: Path) -> tuple[str, str]:
    """Whether the outputs of the two files agree on the data."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    plain, quick = (ort.InferenceSession(str(path), settings) for path in (source, result))
    made = {node.op_type for node in onnx.load(result).graph.node}
    touched = bool(made & {"QuantizeLinear", "DequantizeLinear"})
    said = []
    for file in sorted(data.glob("*.npz")):
        with np.load(file) as arrays:
            feeds = {spec.name: arrays[spec.name] for spec in plain.get_inputs()}
        for spec, wanted, got in zip(plain.get_outputs(), plain.run(None, feeds), quick.run(None, feeds), strict=True):
            complaint, decibels = distance(np.asarray(wanted), np.asarray(got), touched)
            if complaint:
                return "failed", f"wrong output {spec.name}: {complaint}"
            said.append(decibels)
    return ("quantized" if touched else "untouched"), f"{min(said):.1f} dB"


def distance(wanted: Array, got: Array, touched: bool) -> tuple[str, float]:
    """Why two outputs are not close ("" where they are), and their signal to noise in decibels."""
    if wanted.shape != got.shape or wanted.dtype != got.dtype:
        return f"{got.dtype}{list(got.shape)} instead of {wanted.dtype}{list(wanted.shape)}", -np.inf
    if wanted.dtype.kind != "f" or not wanted.size:
        same = touched or np.array_equal(wanted, got)
        return ("" if same else "it is not equal"), np.inf
    x, y = wanted.astype(np.float64), got.astype(np.float64)
    if (np.isfinite(x) != np.isfinite(y)).any():
        return "infinities or NaN where the float model has none, or the reverse", -np.inf
    x, y = x[np.isfinite(x)], y[np.isfinite(x)]
    if not x.size or np.array_equal(x, y):
        return "", np.inf
    noise = float(((x - y) ** 2).sum())
    decibels = 10 * np.log10(max(float((x**2).sum()), 1e-300) / noise)
    span = max(float(np.ptp(x)), float(np.abs(x).max()), 1e-300)
    relative = float(np.abs(x - y).max()) / span
    good = decibels >= LEAST_DB or relative <= MOST_ERROR if touched else relative <= SAME
    return ("" if good else f"{decibels:.1f} dB, off by {relative:.3f} of its range"), float(decibels)


def table(endings: Sequence[Ending], by: str) -> str:
    """Counts of endings by `op` or `opset`, as text."""
    counts = {key: Counter[str]() for key in sorted({getattr(ending, by) for ending in endings})}
    for ending in endings:
        counts[getattr(ending, by)][ending.end] += 1
    lines = [f"{by:30}" + "".join(f"{end:>11}" for end in ENDS)]
    lines += [f"{key!s:30}" + "".join(f"{count[end]:11}" for end in ENDS) for key, count in counts.items()]
    return "\n".join(lines)


def main() -> int:
    """Run the sweep; 1 where a model failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for sweep.json and the files of failures")
    parser.add_argument("--every", type=int, default=1, help="take only every so many models")
    parser.add_argument("--only", default="", help="take only models with this in their names")
    parser.add_argument("--timeout", type=float, default=Limits.seconds, help="seconds per model")
    parser.add_argument("--memory-gb", type=float, default=Limits.memory / 2**30, help="address space per model")
    parser.add_argument("--workers", type=int, default=1, help="models at a time")
    parser.add_argument("options", nargs="*", help="for the command, behind --")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    chosen = [case for case in cases() if given.only in case.name][:: given.every]
    limits = Limits(given.timeout, int(given.memory_gb * 2**30))
    endings = []
    for ending in run_all(chosen, given.out, limits, given.options, given.workers):
        endings.append(ending)
        if ending.end == "failed":
            print(f"FAILED {ending.case}: {ending.message}", flush=True)
        if len(endings) % 100 == 0:
            print(f"{len(endings)} of {len(chosen)}: {dict(Counter(one.end for one in endings))}", flush=True)
    document = {"versions": {"onnx": onnx.__version__}, "endings": [asdict(ending) for ending in endings]}
    (given.out / "sweep.json").write_text(json.dumps(document, indent=1))
    print(table(endings, "op"), table(endings, "opset"), sep="\n\n")
    total = Counter(ending.end for ending in endings)
    print(", ".join(f"{end} {total[end]}" for end in ENDS), "of", len(endings))
    return 1 if total["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
