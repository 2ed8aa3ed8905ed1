"""Serve a float file and then its quantized file with the same code, in every way that this machine can.

    python examples/serving/run_all.py --work ~/serving
    python examples/serving/run_all.py --work ~/serving --model m.onnx --data calibration/ --mean 0.5 --std 0.5

Quantizes the model, makes an environment per example under `--work`, runs each exercise, and compares the outputs with
those of a session in this interpreter: the same bits where it is the same onnxruntime build, otherwise within
`TOLERANCE` of the largest output. Latencies are of single rows on one thread, float and int8 in turns. Exits with 1 if
an example failed or gave other outputs; what the machine lacks is skipped, with what it is.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(ROOT)]

from environments import EXAMPLES, Example, MissingError, Place  # noqa: E402

import onnxq  # noqa: E402
from onnxq.calibrate import open_data  # noqa: E402
from onnxq.runtime import Session  # noqa: E402

SIDES = ("float", "int8")
TOLERANCE = {"float": 1e-4, "int8": 0.02}
"""Of the largest absolute output, for another build: float sums in another order; int8 may round to the next step."""
RUN_LIMIT_S = 900


@dataclass(frozen=True)
class Row:
    """What one example did.

    Attributes:
        example: Its folder.
        state: "ok", "skipped" or "FAILED".
        note: The runtime and its version, or why it was skipped or failed.
        difference: Largest absolute difference to this interpreter's session, by side.
        ms: Latency of a row, by side: the median over slices, each the median of its calls.
        ratio: Quartiles of int8 / float over the pairs of slices: 25 %, 50 %, 75 %.
        load: Requests per second and percentiles by side, where a load test was run.
    """

    example: str
    state: str
    note: str
    difference: dict[str, float] | None = None
    ms: dict[str, float] | None = None
    ratio: tuple[float, ...] | None = None
    load: dict[str, dict[str, float]] | None = None


def write_job(folder: Path, args: argparse.Namespace) -> dict[str, object]:
    """Quantize the model and write the job for all examples."""
    folder.mkdir(parents=True, exist_ok=True)
    preprocess = onnxq.Preprocess(mean=args.mean, std=args.std) if args.mean or args.std else None
    specs = Session(args.model).inputs
    if len(specs) != 1 or specs[0].dtype != "float32":
        raise SystemExit("the examples serve models with one float32 input")
    int8 = folder / "int8.onnx"
    int8.unlink(missing_ok=True)
    onnxq.quantize(args.model, args.data, preprocess=preprocess).save(int8)
    batches = open_data(args.data, specs, samples=args.rows, preprocess=preprocess)
    rows = np.concatenate([feeds[specs[0].name] for feeds in batches])[: args.rows]
    rows.astype("<f4").tofile(folder / "rows.f32")
    models = {"float": str(args.model.resolve()), "int8": str(int8.resolve())}
    said = {**models, "shape": list(rows.shape), "slices": args.slices, "calls": args.calls}
    (folder / "job.json").write_text(json.dumps(said), encoding="utf-8")
    return said


def reference(job: Path) -> dict[str, np.ndarray]:
    """Outputs [rows, ...] of both files in this interpreter, one row at a time on one thread."""
    said = json.loads((job / "job.json").read_text(encoding="utf-8"))
    rows = np.fromfile(job / "rows.f32", "<f4").reshape(said["shape"])
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    found = {}
    for side in SIDES:
        session = ort.InferenceSession(said[side], options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        found[side] = np.concatenate([session.run(None, {name: row[None]})[0] for row in rows])
    return found


def judge(expected: np.ndarray, found: np.ndarray, side: str, same_build: bool) -> tuple[float, str | None]:
    """The largest absolute difference, and what is wrong with it, if anything."""
    if found.size != expected.size:
        return float("inf"), f"{side}: {found.size} values instead of {expected.size}"
    found = found.reshape(expected.shape)
    difference = float(np.abs(found - expected).max())
    if same_build:
        wrong = None if found.tobytes() == expected.tobytes() else f"{side}: not the same bits ({difference:.2g} off)"
        return difference, wrong
    allowed = TOLERANCE[side] * float(np.abs(expected).max())
    wrong = None if difference <= allowed else f"{side}: {difference:.2g} off, {allowed:.2g} is allowed"
    return difference, wrong


def run(example: Example, place: Place, expected: dict[str, np.ndarray]) -> Row:
    """Prepare, run and judge one example."""
    place.out.mkdir(parents=True, exist_ok=True)
    for stale in place.out.iterdir():
        stale.unlink()
    try:
        command = example.prepare(place)
    except MissingError as missing:
        return Row(example.name, "skipped", str(missing))
    argv = [*command.argv] if command.complete else [*command.argv, str(place.job), str(place.out)]
    environment = {**os.environ, **command.env}
    try:
        done = subprocess.run(
            argv, cwd=command.cwd, env=environment, capture_output=True, text=True, timeout=RUN_LIMIT_S
        )
    except subprocess.TimeoutExpired:
        return Row(example.name, "FAILED", f"ran longer than {RUN_LIMIT_S} s")
    if done.returncode or not (place.out / "times.json").exists():
        lines = (done.stderr or done.stdout).strip().splitlines()
        return Row(example.name, "FAILED", lines[-1] if lines else f"exit code {done.returncode}")
    return _judged(example, place.out, expected)


def _judged(example: Example, out: Path, expected: dict[str, np.ndarray]) -> Row:
    times = json.loads((out / "times.json").read_text(encoding="utf-8"))
    difference, wrong = {}, []
    for side in SIDES:
        difference[side], problem = judge(
            expected[side], np.fromfile(out / f"{side}.f32", "<f4"), side, example.same_build
        )
        wrong += [problem] if problem else []
    ratios = [b / a for a, b in zip(times["float_ms"], times["int8_ms"], strict=True)]
    return Row(
        example.name,
        "FAILED" if wrong else "ok",
        "; ".join(wrong) or times["runtime"],
        difference,
        {side: statistics.median(times[f"{side}_ms"]) for side in SIDES},
        tuple(statistics.quantiles(ratios, n=4)),
        times.get("load"),
    )


def table(rows: list[Row]) -> str:
    """The rows as a Markdown table, and the load tests below it."""
    lines = [
        "| example | | float is | int8 is | float ms | int8 ms | int8 / float (quartiles) | runtime |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        cells = [row.example, row.state, "", "", "", "", ""]
        if row.difference and row.ms and row.ratio:
            low, middle, high = row.ratio
            said = [
                "the same bits" if not row.difference[side] else f"{row.difference[side]:.2g} off" for side in SIDES
            ]
            cells = [row.example, row.state, *said, *(f"{row.ms[side]:.3f}" for side in SIDES)]
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
        lines.append("| " + " | ".join([*cells, row.note]) + " |")
    for row in rows:
        for side, load in (row.load or {}).items():
            lines.append(f"{row.example} under load, {side}: " + ", ".join(f"{k} {v:.2f}" for k, v in load.items()))
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    numbers = lambda text: tuple(float(part) for part in text.split(","))  # noqa: E731
    parser.add_argument("--work", type=Path, required=True, help="folder for environments and results (up to 2 GB)")
    parser.add_argument("--only", help="examples, separated by commas")
    parser.add_argument("--model", type=Path, help="default: models/digits_cnn.onnx with its data")
    parser.add_argument("--data", help="calibration data, as for onnxq quantize")
    parser.add_argument("--mean", type=numbers, default=(), metavar="M[,M,M]")
    parser.add_argument("--std", type=numbers, default=(), metavar="S[,S,S]")
    parser.add_argument("--rows", type=int, default=16, help="rows to compare")
    parser.add_argument("--slices", type=int, default=20, help="timed slices of each side")
    parser.add_argument("--calls", type=int, default=50, help="calls per slice")
    parser.add_argument("--ort-include", type=Path, help="folder of onnxruntime_cxx_api.h, for C++")
    parser.add_argument("--json", type=Path, help="write the rows there, too")
    args = parser.parse_args()
    if args.model is None:
        args.model, args.data = ROOT / "models" / "digits_cnn.onnx", str(ROOT / "calibration_data" / "digits")
        args.mean = args.std = (0.5,)
    elif args.data is None:
        parser.error("--model needs --data")
    names = [example.name for example in EXAMPLES]
    args.only = args.only.split(",") if args.only else names
    if unknown := set(args.only) - set(names):
        parser.error(f"no example {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return args


def main() -> None:
    """Run the examples and print the table."""
    args = arguments()
    work = args.work.expanduser().resolve()
    job = work / "job"
    said = write_job(job, args)
    expected = reference(job)
    rows = []
    for example in EXAMPLES:
        if example.name in args.only:
            print(f"{example.name} ...", file=sys.stderr, flush=True)
            rows.append(run(example, Place(work, job, said, work / "out" / example.name, args.ort_include), expected))
    print(table(rows))
    if args.json:
        args.json.write_text(json.dumps([asdict(row) for row in rows], indent=1), encoding="utf-8")
    sys.exit(any(row.state == "FAILED" for row in rows))


if __name__ == "__main__":
    main()
