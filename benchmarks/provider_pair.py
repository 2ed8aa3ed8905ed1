"""A float and a quantized file on onnxruntime's OpenVINO provider, beside its CPU provider.

    provider_pair.py FLOAT.onnx INT8.onnx --data FEEDS [--rows 128] [--seconds 6] [--dynamic]   one JSON line

Needs numpy and onnxruntime-openvino only. Rows are fed one by one, to sessions that are told the sizes of all free axes
(`--dynamic`: that are not). What is compared is the first output, with the float file on the CPU
provider. Latencies are of single rows on one thread, the four sessions in turns. They are the process's own processor
time, which is the latency where nothing else runs: OpenVINO computes in a thread of its own, and on a busy machine
waiting for that thread's turn would be most of the wall time, which is given, too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
from latency import ROWS, SLICE_S, Feed, single_rows

OPENVINO = ("OpenVINOExecutionProvider", {"device_type": "CPU", "num_of_threads": "1"})
CPU = ("CPUExecutionProvider", {})
PROVIDERS = {"cpu": CPU, "openvino": OPENVINO}
TURNS = (15, 200)  # at least, at most


def session(model: str, provider: str, sizes: dict[str, int]) -> ort.InferenceSession:
    """A session of one thread; ends the program where onnxruntime puts another provider in its place."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for axis, size in sizes.items():
        options.add_free_dimension_override_by_name(axis, size)
    opened = ort.InferenceSession(model, options, providers=[PROVIDERS[provider]])
    if opened.get_providers()[0] != PROVIDERS[provider][0]:
        raise SystemExit(f"onnxruntime {ort.__version__} has no {provider} provider")
    return opened


def free_axes(model: str, row: Feed) -> dict[str, int]:
    """Sizes of the named free axes of the inputs when `row` is fed."""
    inputs = session(model, "cpu", {}).get_inputs()
    axes = ((axis, size) for entry in inputs for axis, size in zip(entry.shape, row[entry.name].shape, strict=True))
    return {axis: size for axis, size in axes if isinstance(axis, str)}


def outputs(opened: ort.InferenceSession, feeds: list[Feed]) -> list[np.ndarray]:
    """The first output of every row."""
    return [opened.run(None, feed)[0] for feed in feeds]


def likeness(reference: list[np.ndarray], found: list[np.ndarray]) -> dict[str, float]:
    """SQNR in dB, the largest difference, and the share of equal arg-max along the last axis."""
    noise = sum(float(np.square(a - b, dtype=np.float64).sum()) for a, b in zip(reference, found, strict=True))
    signal = sum(float(np.square(a, dtype=np.float64).sum()) for a in reference)
    same = [(a.argmax(-1) == b.argmax(-1)).ravel() for a, b in zip(reference, found, strict=True)]
    return {
        "sqnr_db": round(10 * np.log10(signal / max(noise, 1e-30)), 1),
        "largest_difference": max(float(np.abs(a - b).max()) for a, b in zip(reference, found, strict=True)),
        "agreement": round(float(np.concatenate(same).mean()), 4),
    }


Times = tuple[float, float]


def timed(sides: dict[str, Callable[[int], Times]], seconds: float) -> dict[str, list[Times]]:
    """Processor and wall seconds per run of each side, slice by slice, the sides in turns."""
    for side in sides.values():
        side(5)
    runs = {name: max(1, round(SLICE_S / min(side(1)[0] for _ in range(5)))) for name, side in sides.items()}
    times: dict[str, list[Times]] = {name: [] for name in sides}
    began = time.perf_counter()
    order = list(sides)
    turn = 0
    while turn < TURNS[0] or (time.perf_counter() - began < seconds and turn < TURNS[1]):
        for name in order:
            sides[name](1)  # brings its weights back into the caches
            times[name].append(sides[name](runs[name]))
        order = order[1:] + order[:1]
        turn += 1
    return times


def runner(opened: ort.InferenceSession, rows: list[Feed]) -> Callable[[int], Times]:
    """A function that runs single rows n times and returns the medians of the runs' processor and wall seconds."""

    def run(runs: int) -> Times:
        processor, wall = [], []
        for i in range(runs):
            began, began_wall = time.process_time(), time.perf_counter()
            opened.run(None, rows[i % len(rows)])
            wall.append(time.perf_counter() - began_wall)
            processor.append(time.process_time() - began)
        return statistics.median(processor), statistics.median(wall)

    return run


def compare(models: dict[str, str], feeds: list[Feed], dynamic: bool, seconds: float) -> dict[str, object]:
    """Likeness and latency of both files on both providers."""
    found, sides = {}, {}
    for provider in PROVIDERS:
        for name, model in models.items():
            opened = session(model, provider, {} if dynamic else free_axes(model, feeds[0]))
            found[f"{name}_{provider}"] = outputs(opened, feeds)
            sides[f"{name}_{provider}"] = runner(opened, feeds[:ROWS])
    times = timed(sides, seconds)

    def ratio(a: str, b: str) -> list[float]:
        ratios = [y[0] / x[0] for x, y in zip(times[a], times[b], strict=True)]
        return [round(cut, 3) for cut in statistics.quantiles(ratios, n=4)]

    def medians(which: int) -> dict[str, float]:
        return {key: round(1e3 * statistics.median(pair[which] for pair in value), 4) for key, value in times.items()}

    return {
        "onnxruntime": ort.__version__,
        "rows": len(feeds),
        "to_float_cpu": {key: likeness(found["float_cpu"], value) for key, value in found.items()},
        "int8_openvino_to_int8_cpu": likeness(found["int8_cpu"], found["int8_openvino"]),
        "processor_ms": medians(0),
        "wall_ms": medians(1),
        "int8_to_float_cpu": ratio("float_cpu", "int8_cpu"),
        "int8_to_float_openvino": ratio("float_openvino", "int8_openvino"),
        "int8_openvino_to_cpu": ratio("int8_cpu", "int8_openvino"),
    }


def main() -> None:
    """Compare two files and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("float_model")
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="folder of .npz batches keyed by input name")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--seconds", type=float, default=6.0, help="time to spend, after the first turns")
    parser.add_argument("--sequence", type=int, default=128, help="token inputs are padded to this length")
    parser.add_argument("--dynamic", action="store_true", help="leave free axes free")
    args = parser.parse_args()
    feeds = single_rows(args.data, args.sequence, args.rows)
    if not feeds:
        parser.error(f"no .npz batches in {args.data}")
    models = {"float": args.float_model, "int8": args.model}
    print(json.dumps(compare(models, feeds, args.dynamic, args.seconds)))


if __name__ == "__main__":
    main()
