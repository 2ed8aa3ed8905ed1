"""A float and a quantized file on onnxruntime's OpenVINO provider, beside its CPU provider.

    provider_pair.py FLOAT.onnx INT8.onnx --data FEEDS [--rows 128] [--seconds 6] [--sequence 128]   one JSON line

Needs numpy and onnxruntime-openvino only. What is compared is the first output, with the float file on the CPU
provider. Latencies are of single rows on one thread, the four sessions in turns: medians of short slices, so that what
interrupts a run now and then does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
from latency import SLICE_S, Feed, single_rows

OPENVINO = ("OpenVINOExecutionProvider", {"device_type": "CPU", "num_of_threads": "1"})
CPU = ("CPUExecutionProvider", {})
PROVIDERS = {"cpu": CPU, "openvino": OPENVINO}
TURNS = (15, 200)  # at least, at most


def session(model: str, provider: str) -> ort.InferenceSession:
    """A session of one thread; ends the program where onnxruntime puts another provider in its place."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    opened = ort.InferenceSession(model, options, providers=[PROVIDERS[provider]])
    if opened.get_providers()[0] != PROVIDERS[provider][0]:
        raise SystemExit(f"onnxruntime {ort.__version__} has no {provider} provider")
    return opened


def batches(folder: Path, rows: int) -> Iterator[Feed]:
    """The stored batches until `rows` rows are reached."""
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as batch:
            feed = {name: batch[name] for name in batch.files}
        yield feed
        rows -= len(next(iter(feed.values())))
        if rows <= 0:
            return


def outputs(opened: ort.InferenceSession, feeds: list[Feed]) -> list[np.ndarray]:
    """The first output of every batch."""
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


def timed(sides: dict[str, Callable[[int], float]], seconds: float) -> dict[str, list[float]]:
    """Seconds per run of each side, slice by slice, the sides in turns."""
    for side in sides.values():
        side(5)
    runs = {name: max(1, round(SLICE_S / min(side(1) for _ in range(5)))) for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
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


def runner(opened: ort.InferenceSession, rows: list[Feed]) -> Callable[[int], float]:
    """A function that runs single rows n times and returns the median of the runs' seconds."""

    def run(runs: int) -> float:
        times = []
        for i in range(runs):
            began = time.perf_counter()
            opened.run(None, rows[i % len(rows)])
            times.append(time.perf_counter() - began)
        return statistics.median(times)

    return run


def compare(models: dict[str, str], folder: Path, rows: int, sequence: int, seconds: float) -> dict[str, object]:
    """Likeness and latency of both files on both providers."""
    feeds, singles = list(batches(folder, rows)), single_rows(folder, sequence)
    found, sides = {}, {}
    for provider in PROVIDERS:
        for name, model in models.items():
            key = f"{name}_{provider}"
            found[key] = outputs(session(model, provider), feeds)
            sides[key] = runner(session(model, provider), singles)  # its own: shapes never change in it
    times = timed(sides, seconds)

    def ratio(a: str, b: str) -> list[float]:
        return [round(cut, 3) for cut in statistics.quantiles([y / x for x, y in zip(times[a], times[b])], n=4)]  # noqa: B905

    return {
        "onnxruntime": ort.__version__,
        "rows": sum(len(found_rows) for found_rows in found["float_cpu"]),
        "to_float_cpu": {key: likeness(found["float_cpu"], value) for key, value in found.items()},
        "int8_openvino_to_int8_cpu": likeness(found["int8_cpu"], found["int8_openvino"]),
        "median_ms": {key: round(1e3 * statistics.median(value), 4) for key, value in times.items()},
        "fastest_ms": {key: round(1e3 * min(value), 4) for key, value in times.items()},
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
    args = parser.parse_args()
    models = {"float": args.float_model, "int8": args.model}
    print(json.dumps(compare(models, args.data, args.rows, args.sequence, args.seconds)))


if __name__ == "__main__":
    main()
