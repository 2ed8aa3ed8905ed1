"""Latency of a quantized model as a ratio to its float model, robust on a noisy machine.

    latency.py FLOAT.onnx INT8.onnx --data FEEDS [--threads 1] [--seconds 6] [--sequence 128]   one JSON line

Both sessions live in one process and run in turn, a few runs of one and then of the other, the first of a
pair changing from pair to pair. A pair gives one ratio; the result is the median over the pairs, so what
slows the whole machine for a while cancels. Inputs are single calibration rows; token rows are padded.
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

Feed = dict[str, np.ndarray]
ROWS = 8  # different inputs, used in turn
PAIRS = (15, 400)  # at least, at most
SLICE_S = 0.02  # one side of a pair runs at least about this long


def session(model: str, threads: int) -> ort.InferenceSession:
    """A CPU session. Its threads stop spinning when a run ends, or they would slow the other model's run."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def single_rows(folder: Path, sequence: int, limit: int = ROWS) -> list[Feed]:
    """The first `limit` calibration rows as batches of one; inputs of tokens are padded with 0 to `sequence`."""
    rows: list[Feed] = []
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as batch:
            feed = {name: batch[name] for name in batch.files}
        count = min(len(next(iter(feed.values()))), limit - len(rows))
        rows += [{name: _padded(value[i : i + 1], sequence) for name, value in feed.items()} for i in range(count)]
        if len(rows) == limit:
            break
    return rows


def _padded(value: np.ndarray, sequence: int) -> np.ndarray:
    if value.ndim != 2 or value.dtype.kind != "i":
        return np.ascontiguousarray(value)
    return np.ascontiguousarray(np.pad(value[:, :sequence], ((0, 0), (0, max(0, sequence - value.shape[1])))))


def runner(model: str, rows: list[Feed], threads: int) -> Callable[[int], float]:
    """A function that runs the model n times and returns seconds per run; it is warm when returned."""
    opened = session(model, threads)
    position = 0

    def timed(runs: int) -> float:
        nonlocal position
        feeds = [rows[(position + i) % len(rows)] for i in range(runs)]
        position += runs
        began = time.perf_counter()
        for feed in feeds:
            opened.run(None, feed)
        return (time.perf_counter() - began) / runs

    timed(5)
    return timed


def interval(values: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median, from the order of the values alone."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    first = max(0, int(len(values) / 2 - half))
    return ordered[first], ordered[len(values) - 1 - first]


def compare(float_model: str, model: str, rows: list[Feed], threads: int, seconds: float) -> dict[str, float]:
    """Median of the paired ratios model / float, its 95 % interval and the quartiles, and the median times."""
    sides = [runner(float_model, rows, threads), runner(model, rows, threads)]
    runs = [max(1, round(SLICE_S / min(side(1) for _ in range(5)))) for side in sides]
    times: list[tuple[float, float]] = []
    began = time.perf_counter()
    while len(times) < PAIRS[0] or (time.perf_counter() - began < seconds and len(times) < PAIRS[1]):
        taken = [0.0, 0.0]
        for side in (0, 1) if len(times) % 2 else (1, 0):
            sides[side](1)  # brings its weights back into the caches
            taken[side] = sides[side](runs[side])
        times.append((taken[0], taken[1]))
    ratios = [b / a for a, b in times]
    low, middle, high = statistics.quantiles(ratios, n=4)
    fastest = [min(column) for column in zip(*times, strict=True)]
    return {
        "threads": threads,
        "pairs": len(times),
        "ratio": round(middle, 4),
        "ratio_q1": round(low, 4),
        "ratio_q3": round(high, 4),
        "ratio_low": round(interval(ratios)[0], 4),
        "ratio_high": round(interval(ratios)[1], 4),
        "ratio_of_minima": round(fastest[1] / fastest[0], 4),
        "float_ms": round(1e3 * statistics.median(a for a, _ in times), 4),
        "model_ms": round(1e3 * statistics.median(b for _, b in times), 4),
    }


def main() -> None:
    """Compare two files and print one JSON line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("float_model")
    parser.add_argument("model")
    parser.add_argument("--data", type=Path, required=True, help="folder of .npz batches keyed by input name")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0, help="time to spend, after the first pairs")
    parser.add_argument("--sequence", type=int, default=128, help="token inputs are padded to this length")
    args = parser.parse_args()
    rows = single_rows(args.data, args.sequence)
    if not rows:
        parser.error(f"no .npz batches in {args.data}")
    print(json.dumps(compare(args.float_model, args.model, rows, args.threads, args.seconds)))


if __name__ == "__main__":
    main()
