"""Speed of 8-bit quantizers side by side: every file of a model is timed in turns with the float file, in one run.

    python benchmarks/fastest.py --out DIR MODEL.onnx=FEEDS [...] [--threads 1 2] [--seconds 2] [--samples 32]

FEEDS is a folder of .npz batches (`shaped.py` writes models with such folders). DIR gets the files, the logs, one JSON
document per model as `onnxq benchmark --save` writes it, and fastest.md: times as shares of the float file's, with 95 %
intervals, and how near onnxq's file comes to the machine's peak. A quantizer that fails is left out, and said.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from process import run
from rivals import command, environment

RIVALS = ("ort-static", "ort-dynamic")
OURS = {"onnxq rules": ("--placement", "rules"), "onnxq fastest": ("--preset", "fastest")}


def quantize(model: Path, feeds: Path, out: Path, samples: int, threads: int, rivals: list[str]) -> dict[str, Path]:
    """The files of all quantizers, by name; those that do not depend on the threads are made once."""
    made: dict[str, Path] = {}
    for name, options in OURS.items():
        path = out / f"{model.stem}.{name.replace(' ', '-')}.{threads}.onnx"
        argv = [*command("onnxq", model, feeds, path), *options, "--threads", str(threads), "--samples", str(samples)]
        made |= {name: path} if _done(argv, path) else {}
    for name in rivals:
        path = out / f"{model.stem}.{name}.onnx"
        if path.exists() or _done(command(name, model, feeds, path), path):
            made[name] = path
    return made


def _done(argv: list[str], path: Path) -> bool:
    finished = run(argv, path.with_suffix(""), env=environment())
    if finished.status:
        print(f"{path.name}: {finished.complaint}", file=sys.stderr)
    return finished.status == 0


def measure(model: Path, made: dict[str, Path], out: Path, threads: int, seconds: float) -> list[dict[str, Any]]:
    """Entries of `onnxq benchmark`, the float file's first."""
    kept = out / f"{model.stem}.{threads}.json"
    argv = [sys.executable, "-m", "onnxq", "benchmark", str(model), *map(str, made.values()), "--provider", "cpu"]
    finished = run(
        [*argv, "--threads", str(threads), "--seconds", str(seconds), "--save", str(kept)],
        kept.with_suffix(""),
        env=environment(),
    )
    if finished.status:
        raise SystemExit(f"fastest: {finished.complaint}")
    return list(json.loads(kept.read_text(encoding="utf-8"))["latencies"])


def row(model: Path, threads: int, names: list[str], entries: list[dict[str, Any]]) -> str:
    """One line of the table."""
    cells = [model.stem, str(threads), f"{entries[0]['median_ms']:.3f} ms"]
    found = dict(zip(names, entries[1:], strict=True))
    for name in (*OURS, *RIVALS):
        ratio = found[name]["ratio"] if name in found else None
        cells.append("-" if ratio is None else f"{ratio['value']:.2f} ({ratio['low']:.2f}-{ratio['high']:.2f})")
    for entry in (entries[0], found.get("onnxq fastest", {})):
        roof = entry.get("roofline")
        cells.append("-" if not roof else f"{100 * roof['share_of_peak']:.0f} %")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Quantize, measure, write the table."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("models", nargs="+", metavar="MODEL.onnx=FEEDS")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument(
        "--rivals", nargs="*", choices=RIVALS, default=list(RIVALS), help="dynamic convolutions are slow"
    )
    parser.add_argument("--samples", type=int, default=32)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    heads = ["model", "threads", "float", *OURS, *RIVALS, "float of peak", "fastest of peak"]
    lines = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for text in args.models:
        model, feeds = (Path(part).resolve() for part in text.split("=", 1))
        for threads in args.threads:
            made = quantize(model, feeds, args.out, args.samples, threads, args.rivals)
            lines.append(row(model, threads, list(made), measure(model, made, args.out, threads, args.seconds)))
            (args.out / "fastest.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
            print(lines[-1], flush=True)


if __name__ == "__main__":
    main()
