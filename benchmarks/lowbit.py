"""Fewer than 8 bits: what every way to tune gives, on real models.

    ONNXQ_ASSETS=DIR python benchmarks/lowbit.py --out DIR [--models NAME ...] [--bits W8A8 ...] [--ways NAME ...]
                                                 [--seeds 0 1 2] [--first-last 8] [--samples 512] [--limit 10000]

Every way gets the same calibration rows. Ways that learn run once per seed, and mean and half the spread are shown.
W4A8 is 4 bits per weight and 8 per activation; C4A8 the same with weights in codebooks, --codebook-bits 4.
DIR gets lowbit.jsonl, a row per run, and lowbit.md; a run that lowbit.jsonl has already is not repeated. Agreement is
with the float model; activations below 8 bits are simulated. See w8a8.py for the models.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from process import ChildError, run
from scoring import Subject
from w8a8 import MODELS, subjects

WAYS: Mapping[str, Sequence[str]] = {
    "calibrated": ["--no-bn-tuning"],
    "light": ["--preset", "light"],
    "adaquant-parallel": ["--reconstruction", "adaquant", "--unit", "parallel"],
    "adaquant-layer": ["--reconstruction", "adaquant", "--unit", "layer"],
    "adaquant-block": ["--reconstruction", "adaquant"],
    "adaround-block": ["--reconstruction", "adaround"],
    "advanced": ["--preset", "advanced"],
}
LEARNING = ("adaquant-parallel", "adaquant-layer", "adaquant-block", "adaround-block", "advanced")
BITS = ("W8A8", "W6A6", "W4A8", "W4A4", "W3A4", "W3A3", "W2A4")


@dataclass(frozen=True)
class Run:
    """One call of `onnxq quantize`."""

    model: str
    bits: str
    first_last: int
    samples: int
    way: str
    seed: int

    @property
    def label(self) -> str:
        """A file name."""
        return f"{self.model}.{self.bits}.f{self.first_last}.n{self.samples}.{self.way}.{self.seed}"


def measured(run_: Run, subject: Subject, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize and score once."""
    out = args.out / "models" / f"{run_.label}.onnx"
    out.parent.mkdir(parents=True, exist_ok=True)
    log = args.out / "logs" / run_.label
    found = re.fullmatch(r"([WC])(\d+)A(\d+)", run_.bits)
    assert found is not None, run_.bits
    argv = [sys.executable, "-m", "onnxq", "quantize", str(subject.model), "--data", str(subject.feeds), "-o", str(out)]
    option = "--weight-bits" if found[1] == "W" else "--codebook-bits"
    argv += [option, found[2], "--activation-bits", found[3], "--first-last", str(run_.first_last)]
    argv += ["--samples", str(run_.samples), "--seed", str(run_.seed), "--no-timing", "--json", *WAYS[run_.way]]
    finished = run(argv, log, args.timeout)
    row: dict[str, Any] = {**asdict(run_), "cost": asdict(finished.cost)}
    if finished.status != 0:
        return {**row, "message": finished.complaint}
    try:
        score = subject.score(out, args.limit, log.with_name(f"{log.name}.score"))
    except ChildError as error:
        return {**row, "message": str(error)}
    verdict = json.loads(finished.stdout)["verdict"]
    coverage = verdict["integer_coverage"]
    return {**row, "score": asdict(score), "bytes": out.stat().st_size, "integer_coverage": coverage}


def planned(names: Iterable[str], args: argparse.Namespace) -> list[Run]:
    """All runs; ways without randomness run once."""
    return [
        Run(name, bits, args.first_last, args.samples, way, seed)
        for name in names
        for bits in args.bits
        for way in args.ways
        for seed in (args.seeds if way in LEARNING else args.seeds[:1])
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a line per model, bits and way; mean and half the spread over the seeds."""
    lines = ["| model | bits | way | metric | agreement % | SQNR dB | KB | seconds | peak MB |", "| --- " * 9 + "|"]
    groups: dict[tuple[str, str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["model"], row["bits"], row["way"]), []).append(row)
    for key, group in groups.items():
        scored = [row["score"] for row in group if "score" in row]
        if not scored:
            lines.append(f"| {' | '.join(key)} | {group[0].get('message', '')} | | | | | |")
            continue
        cells = [spread(scored, "value", 100, 2), spread(scored, "agreement", 100, 1), spread(scored, "sqnr_db", 1, 1)]
        costs = [row["cost"] for row in group]
        cells.append(f"{max(row['bytes'] for row in group if 'bytes' in row) / 1000:.1f}")
        cells += [spread(costs, "wall_s", 1, 0), f"{max(cost['peak_mb'] for cost in costs):.0f}"]
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines) + "\n"


def spread(rows: Sequence[Mapping[str, Any]], key: str, factor: float, digits: int) -> str:
    """Mean, and half the distance between the extremes where there are several."""
    values = [factor * row[key] for row in rows if row[key] is not None]
    if not values:
        return "-"
    mean = f"{sum(values) / len(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} +- {(max(values) - min(values)) / 2:.{digits}f}"


def options() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, files and logs")
    parser.add_argument("--models", nargs="+", default=[name for name in MODELS if "folded" not in name])
    parser.add_argument("--bits", nargs="+", default=list(BITS), metavar="WnAn|CnAn")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--first-last", type=int, default=8)
    parser.add_argument("--samples", type=int, default=512, help="calibration rows (default: 512)")
    parser.add_argument("--limit", type=int, help="score the first N evaluation rows only")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds that a run may take")
    return parser.parse_args()


def main() -> None:
    """Run what is missing; the table goes to stdout too."""
    args = options()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "lowbit.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    known = {Run(**{name: row[name] for name in Run.__dataclass_fields__}) for row in rows}
    chosen = {subject.name: subject for subject in subjects(args.models, args.out)}
    for name, subject in chosen.items():
        subject.write_feeds(args.samples, args.out / "logs" / f"{name}.feeds")
    for run_ in planned(chosen, args):
        if run_ in known:
            continue
        print(run_.label, file=sys.stderr, flush=True)
        rows.append(measured(run_, chosen[run_.model], args))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        (args.out / "lowbit.md").write_text(table(rows), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
