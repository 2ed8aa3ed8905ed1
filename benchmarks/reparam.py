"""What each rewrite of the float graph does: nodes, exactness, and accuracy after quantization with and without it.

    ONNXQ_ASSETS=DIR python benchmarks/reparam.py --out DIR [--models NAME ...] [--bits 8 6] [--limit 2000]

Every model is quantized with all rewrites, and once more without each rewrite that applies to it, at the same bits for
weights and activations. DIR gets reparam.md, the files and the logs. See w8a8.py for the models.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from process import ChildError, run
from scoring import Score, Subject
from w8a8 import MODELS, subjects

QUANTIZE = [sys.executable, "-m", "onnxq", "quantize"]
REPARAM = [sys.executable, "-m", "onnxq", "reparam"]


def rewritten(subject: Subject, out: Path) -> dict[str, Any]:
    """What `onnxq reparam` reports."""
    target = out / "models" / f"{subject.name}.reparam.onnx"
    target.parent.mkdir(parents=True, exist_ok=True)
    return _document([*REPARAM, str(subject.model), "-o", str(target), "--json"], out / "logs" / target.stem)


def _document(argv: list[str], log: Path) -> dict[str, Any]:
    """The JSON document that a command of onnxq prints."""
    finished = run(argv, log)
    if finished.status != 0:
        raise ChildError(finished.complaint)
    document: dict[str, Any] = json.loads(finished.stdout)
    return document


def quantized(subject: Subject, bits: int, extra: list[str], label: str, out: Path, limit: int | None) -> Score:
    """The score of one quantized file."""
    target = out / "models" / f"{subject.name}.{bits}.{label}.onnx"
    log = out / "logs" / target.stem
    widths = ["--weight-bits", str(bits), "--activation-bits", str(bits)]
    argv = [*QUANTIZE, str(subject.model), "--data", str(subject.feeds), "-o", str(target), "--no-timing", "--json"]
    _document([*argv, *widths, *extra], log)
    return subject.score(target, limit, log.with_name(f"{log.name}.score"))


def variants(report: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """All rewrites, and all but each that applies."""
    applied = dict.fromkeys(entry["name"] for entry in report["passes"] if entry["count"])
    return [("all", []), *((f"without {name}", ["--without", name]) for name in applied)]


def table(subject: Subject, args: argparse.Namespace) -> str:
    """One model as markdown."""
    report = rewritten(subject, args.out)
    counts = ", ".join(f"{entry['name']} {entry['count']}" for entry in report["passes"] if entry["count"])
    lines = [
        f"## {subject.name}",
        "",
        f"{report['nodes_before']} nodes -> {report['nodes_after']}; largest difference "
        f"{report['gap']:.1e} of an output's range; {counts}",
        "",
        "| rewrites | " + " | ".join(f"W{b}A{b}: metric, agreement %, SQNR dB" for b in args.bits) + " |",
        "| --- |" + " --- |" * len(args.bits),
    ]
    for label, extra in variants(report):
        cells = [_cell(subject, bits, extra, label, args) for bits in args.bits]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join([*lines, ""])


def _cell(subject: Subject, bits: int, extra: list[str], label: str, args: argparse.Namespace) -> str:
    try:
        score = quantized(subject, bits, extra, label.replace(" ", "-"), args.out, args.limit)
    except ChildError as error:
        return str(error)
    value = "" if score.value is None else f"{100 * score.value:.2f}"
    agreement = "" if score.agreement is None else f"{100 * score.agreement:.2f}"
    return f"{value}, {agreement}, {score.sqnr_db:.1f}"


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark; the tables go to stdout too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, files and logs")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--bits", nargs="+", type=int, default=[8, 6], help="weight and activation bits (8 6)")
    parser.add_argument("--limit", type=int, help="score the first N evaluation rows only")
    parser.add_argument("--samples", type=int, default=256, help="calibration rows (default: 256)")
    args = parser.parse_args(argv)
    args.out = args.out.resolve()
    found = []
    for subject in subjects(args.models, args.out):
        subject.write_feeds(args.samples, args.out / "logs" / f"{subject.name}.feeds")
        found.append(table(subject, args))
        (args.out / "reparam.md").write_text("\n".join(found), encoding="utf-8")
    print("\n".join(found))


if __name__ == "__main__":
    main()
