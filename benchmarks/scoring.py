"""Scores of a float or quantized file: by the task of the assets, or by its outputs on feeds.

    scoring.py MODEL.onnx --reference FLOAT.onnx --data FEEDS        one JSON line

The second form compares the first outputs of the two files: SQNR, and agreement where they are class scores.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from process import ask


@dataclass(frozen=True)
class Score:
    """How good the outputs of a file are; what does not apply is None."""

    metric: str | None
    value: float | None
    agreement: float | None
    sqnr_db: float | None
    rows: int


@dataclass(frozen=True)
class Subject:
    """A float model to quantize, its calibration feeds, and the evaluator of its task if it has one."""

    name: str
    model: Path
    feeds: Path
    evaluator: Path | None

    def write_feeds(self, samples: int, log: Path) -> None:
        """Let the evaluator write the calibration feeds; a model without a task brings its own."""
        if self.evaluator:
            self.feeds.mkdir(parents=True, exist_ok=True)
            for stale in self.feeds.glob("*.npz"):
                stale.unlink()
            argv = [sys.executable, str(self.evaluator), str(self.model), "--calibration", str(self.feeds)]
            ask([*argv, "--samples", str(samples)], log)

    def score(self, model: Path, limit: int | None, log: Path) -> Score:
        """Score `model`, with the float model as the reference."""
        reference = [] if model == self.model else ["--reference", str(self.model)]
        if self.evaluator:
            argv = [sys.executable, str(self.evaluator), str(model), "--threads", "2", *reference]
            return _score(ask([*argv, "--limit", str(limit)] if limit else argv, log))
        argv = [sys.executable, str(Path(__file__).resolve()), str(model), "--data", str(self.feeds)]
        return _score(ask([*argv, "--reference", str(self.model)], log))


def _score(row: dict[str, Any]) -> Score:
    metric = next((name for name in ("top1", "spearman") if name in row), None)
    value = row[metric] if metric else None
    return Score(metric, value, row.get("agreement"), row.get("sqnr_db"), row["n"])


def fidelity(model: str, reference: str, folder: Path) -> dict[str, object]:
    """Output SQNR and, for outputs [rows, classes], top-1 agreement of two files on the feeds of a folder."""
    import numpy as np
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    cpu = ["CPUExecutionProvider"]
    sessions = [ort.InferenceSession(path, options, providers=cpu) for path in (model, reference)]
    signal = noise = 0.0
    same, rows, classes = 0, 0, True
    for path in sorted(folder.glob("*.npz")):
        with np.load(path, allow_pickle=False) as batch:
            feed = {name: batch[name] for name in batch.files}
        got, wanted = (np.asarray(session.run(None, feed)[0], np.float64) for session in sessions)
        signal, noise = signal + float((wanted**2).sum()), noise + float(((got - wanted) ** 2).sum())
        rows += len(wanted)
        classes = classes and wanted.ndim == 2
        same += int((got.argmax(-1) == wanted.argmax(-1)).sum())
    sqnr = 10 * float(np.log10(signal / max(noise, 1e-30)))
    return {"n": rows, "sqnr_db": sqnr, "agreement": same / rows if classes else None}


def main() -> None:
    """Compare two files over feeds and print one JSON line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model")
    parser.add_argument("--reference", required=True)
    parser.add_argument("--data", type=Path, required=True)
    args = parser.parse_args()
    print(json.dumps(fidelity(args.model, args.reference, args.data)))


if __name__ == "__main__":
    main()
