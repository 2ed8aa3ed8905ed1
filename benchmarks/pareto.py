"""Size against accuracy: bits by integer program, by a greedy method, and uniform, at the same file sizes.

    ONNXQ_ASSETS=DIR python benchmarks/pareto.py --out DIR [--models NAME ...] [--bits 6 5 4 3 2] [--presets light]
                                                 [--samples 512] [--limit 10000]

The sizes are those of the files with the same weight bits in every layer (the first and the last one have 8). At each
of them, and half-way between two, the integer program gets that size as its budget (`--max-size`, 0.1 % more for the
recipe in the file, whose text differs). The greedy method takes the same sensitivities and sizes; it and the program
are compared without learning (preset light). DIR gets pareto.jsonl, a row per file, and pareto.md; what is there
already is not repeated. See w8a8.py for the models.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from process import ChildError, run
from scoring import Subject
from w8a8 import subjects

MODELS = ("resnet20_cifar10_bn", "mbv2_cifar10_bn", "convt_ashu_cifar10", "minilm_l6")
HERE = Path(__file__).resolve().parent


def quantized(subject: Subject, label: str, extra: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """One file: its size, score and cost."""
    out = args.out / "models" / f"{subject.name}.{label}.onnx"
    out.parent.mkdir(parents=True, exist_ok=True)
    log = args.out / "logs" / out.stem
    argv = [sys.executable, *extra, str(subject.model), "--data", str(subject.feeds), "-o", str(out)]
    finished = run([*argv, "--samples", str(args.samples)], log, args.timeout)
    row: dict[str, Any] = {"model": subject.name, "label": label, "cost": asdict(finished.cost)}
    if finished.status != 0:
        return {**row, "message": finished.complaint}
    try:
        score = subject.score(out, args.limit, log.with_name(f"{log.name}.score"))
    except ChildError as error:
        return {**row, "message": str(error)}
    return {**row, "bytes": out.stat().st_size, "score": asdict(score)}


def command(preset: str, *extra: str) -> list[str]:
    """`onnxq quantize` with a preset and options."""
    return ["-m", "onnxq", "quantize", "--preset", preset, "--no-timing", *extra]


class Rows:
    """What was measured, kept in a file."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._path, self._args = args.out / "pareto.jsonl", args
        text = self._path.read_text(encoding="utf-8") if self._path.exists() else ""
        self.found = {(row["model"], row["label"]): row for row in map(json.loads, text.splitlines())}

    def measure(self, subject: Subject, label: str, extra: list[str]) -> dict[str, Any]:
        """The row of one file, measured if it is not there yet."""
        key = (subject.name, label)
        if key not in self.found:
            print(*key, file=sys.stderr, flush=True)
            self.found[key] = quantized(subject, label, extra, self._args)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(self.found[key]) + "\n")
            (self._args.out / "pareto.md").write_text(self.table(), encoding="utf-8")
        return self.found[key]

    def table(self) -> str:
        """Markdown, the largest file of each model first."""
        lines = ["| model | bits | size | metric | agreement % | SQNR dB | seconds |", "| --- " * 7 + "|"]
        shown = [row for row in self.found.values() if row["model"] in self._args.sizes]
        for row in sorted(shown, key=lambda row: (row["model"], -row.get("bytes", 0))):
            score = row.get("score")
            if score is None:
                lines.append(f"| {row['model']} | {row['label']} | {row['message']} | | | | |")
                continue
            share = row["bytes"] / self._args.sizes[row["model"]]
            agreement = 100 * score["agreement"] if score["agreement"] is not None else float("nan")
            cells = [f"{100 * score['value']:.2f}", f"{agreement:.1f}", f"{score['sqnr_db']:.1f}"]
            cells.append(f"{row['cost']['wall_s']:.0f}")
            lines.append(f"| {row['model']} | {row['label']} | {share:.4f}x | {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def fronts(subject: Subject, rows: Rows, args: argparse.Namespace) -> None:
    """All points of one model."""
    for preset in args.presets:
        sizes = []
        for bits in args.bits:
            row = rows.measure(subject, f"{preset}, uniform {bits}", command(preset, "--weight-bits", str(bits)))
            if "bytes" in row:
                sizes.append(row["bytes"])
        between = [(one + other) // 2 for one, other in itertools.pairwise(sizes)]
        for size in sorted({*sizes, *between}, reverse=True):
            rows.measure(subject, f"{preset}, program {size}", command(preset, "--max-size", f"{size * 1.001:.0f}B"))
            if preset == "light":
                rows.measure(subject, f"greedy {size}", [str(HERE / "greedy.py"), "--max-size", f"{size * 1.001:.0f}"])


def main() -> None:
    """Measure what is missing and print the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, files and logs")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, default=[6, 5, 4, 3, 2])
    parser.add_argument("--presets", nargs="+", default=["light"])
    parser.add_argument("--samples", type=int, default=512, help="calibration rows (default: 512)")
    parser.add_argument("--limit", type=int, help="score the first N evaluation rows only")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds that a run may take")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = subjects(args.models, args.out)
    args.sizes = {subject.name: subject.model.stat().st_size for subject in chosen}
    rows = Rows(args)
    for subject in chosen:
        subject.write_feeds(args.samples, args.out / "logs" / f"{subject.name}.feeds")
        fronts(subject, rows, args)
    print(rows.table())


if __name__ == "__main__":
    main()
