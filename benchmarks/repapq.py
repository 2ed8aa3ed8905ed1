"""RepAPQ: ranges, affine layers, losses and the stage's error, on networks without and with outliers.

    ONNXQ_ASSETS=DIR python benchmarks/repapq.py --out DIR [--models NAME ...] [--bits W8A8 ...] [--ranges mse mae ...]
        [--ways NAME ...] [--steps channel tensor] [--stress none channels samples] [--seeds 0 1 2] [--iterations 300]

Ways: plain ranges and rounding; matched moments; AdaRound by squared error; affine layers trained by squared (mse),
absolute (mae) or either (auto) error of the block, and with the stage's (+stage); with learned rounding; and, for one
weight step per tensor, affine layers that give it one per channel. Stress: `channels` makes some channels of the fused
network 32 times as large (see outliers.py; scores stay), `samples` some calibration rows 8 times.

Learning ways run once per seed. DIR gets repapq.jsonl, a row per run, and repapq.md; a run that repapq.jsonl has is not
repeated. See w8a8.py for the models.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowbit import spread
from process import ChildError, run
from scoring import Subject
from w8a8 import subjects

HERE = Path(__file__).resolve().parent
MODELS = ["repnet_cifar10_train", "resnet20_cifar10_bn", "mbv2_cifar10_bn"]
PLAIN, MATCHED = "none", "moments"
WAYS: Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]] = {
    PLAIN: [],
    MATCHED: [],
    "adaround": [("adaround", {})],
    "affine mse": [("repapq", {"loss": "mse", "stage": 0.0})],
    "affine mae": [("repapq", {"loss": "mae", "stage": 0.0})],
    "affine auto": [("repapq", {"loss": "auto", "stage": 0.0})],
    "affine mse+stage": [("repapq", {"loss": "mse"})],
    "affine mae+stage": [("repapq", {"loss": "mae"})],
    "rounding mse": [("repapq", {"loss": "mse", "stage": 0.0, "rounding": True})],
    "rounding mse+stage": [("repapq", {"loss": "mse", "rounding": True})],
    "rounding mae+stage": [("repapq", {"loss": "mae", "rounding": True})],
    "spread mse+stage": [("repapq", {"loss": "mse", "spread": True})],
    "spread mae+stage": [("repapq", {"loss": "mae", "spread": True})],
}
STRESS = ("none", "channels", "samples")


@dataclass(frozen=True)
class Run:
    """One quantized file."""

    model: str
    bits: str
    steps: str
    stress: str
    ranges: str
    way: str
    iterations: int
    samples: int
    seed: int

    @property
    def label(self) -> str:
        """A file name."""
        return "_".join(str(part).replace(" ", "-") for part in asdict(self).values())


def stressed(subject: Subject, stress: str, out: Path) -> Subject:
    """The subject with outliers in its network or in its calibration data."""
    if stress == "none":
        return subject
    script = [sys.executable, str(HERE / "outliers.py")]
    log = out / "logs" / f"{subject.name}.{stress}"
    if stress == "samples":
        feeds = out / "calibration" / f"{subject.name}.loud"
        _done([*script, "data", str(subject.feeds), str(feeds)], log)
        return Subject(subject.name, subject.model, feeds, subject.evaluator)
    fused, loud = (out / "models" / f"{subject.name}.{kind}.onnx" for kind in ("fused", "loud"))
    fused.parent.mkdir(parents=True, exist_ok=True)
    _done([sys.executable, "-m", "onnxq", "reparam", str(subject.model), "-o", str(fused)], log.with_suffix(".fused"))
    _done([*script, "model", str(fused), str(loud)], log)
    return Subject(subject.name, loud, subject.feeds, subject.evaluator)


def _done(argv: list[str], log: Path) -> None:
    finished = run(argv, log)
    if finished.status != 0:
        raise ChildError(finished.complaint)


def measured(run_: Run, subject: Subject, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize and score once."""
    found = re.fullmatch(r"W(\d+)A(\d+)", run_.bits)
    assert found is not None, run_.bits
    recipe = {
        "weight_bits": int(found[1]),
        "activation_bits": int(found[2]),
        "per_channel": run_.steps == "channel",
        "ranges": run_.ranges,
        "samples": run_.samples,
        "seed": run_.seed,
        "bn_tuning": run_.way == MATCHED,
    }
    methods = [(name, {"iterations": run_.iterations, **given}) for name, given in WAYS[run_.way]]
    return {**asdict(run_), **quantized(subject, run_.label, recipe, methods, args)}


def quantized(
    subject: Subject,
    label: str,
    recipe: Mapping[str, Any],
    methods: Sequence[tuple[str, Mapping[str, Any]]],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One file by `tuned.py`: score, errors of its blocks, and cost; or why there is none."""
    out = args.out / "models" / f"{label}.onnx"
    out.parent.mkdir(parents=True, exist_ok=True)
    log = args.out / "logs" / label
    job = {"model": str(subject.model), "data": str(subject.feeds), "out": str(out), "recipe": recipe}
    finished = run([sys.executable, str(HERE / "tuned.py"), json.dumps({**job, "methods": methods})], log, args.timeout)
    row: dict[str, Any] = {"cost": asdict(finished.cost)}
    if finished.status != 0:
        return {**row, "message": finished.complaint}
    try:
        score = subject.score(out, args.limit, log.with_name(f"{log.name}.score"))
    except ChildError as error:
        return {**row, "message": str(error)}
    if not args.keep:
        out.unlink()
    return {**row, "score": asdict(score), "blocks": json.loads(finished.stdout.splitlines()[-1])}


def planned(names: Sequence[str], args: argparse.Namespace) -> list[Run]:
    """All runs; ways without randomness run once, and steps per channel need not be spread."""
    return [
        Run(name, bits, steps, stress, ranges, way, args.iterations, args.samples, seed)
        for name in names
        for stress in args.stress
        for bits in args.bits
        for steps in args.steps
        for ranges in args.ranges
        for way in args.ways
        if steps == "tensor" or not way.startswith("spread")
        for seed in (args.seeds if WAYS[way] else args.seeds[:1])
    ]


def table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> str:
    """Markdown: a line per combination of `keys`; mean and half the spread over the seeds."""
    titles = [*keys, "metric", "agreement %", "SQNR dB", "block error", "seconds"]
    lines = [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(str(row[key]) for key in keys), []).append(row)
    for key, group in groups.items():
        scored = [row["score"] for row in group if "score" in row]
        if not scored:
            lines.append(f"| {' | '.join(key)} | {group[0].get('message', '')} | | | | |")
            continue
        last = [{"error": [*row["blocks"].values()][-1][1]} for row in group if row.get("blocks")]
        cells = [spread(scored, "value", 100, 2), spread(scored, "agreement", 100, 1), spread(scored, "sqnr_db", 1, 1)]
        cells += [spread(last, "error", 1, 5), spread([row["cost"] for row in group], "wall_s", 1, 0)]
        lines.append(f"| {' | '.join((*key, *cells))} |")
    return "\n".join(lines) + "\n"


def common(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the options that this and borders.py share."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, files and logs")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--iterations", type=int, default=300, help="steps per block (default: 300)")
    parser.add_argument("--samples", type=int, default=512, help="calibration rows (default: 512)")
    parser.add_argument("--limit", type=int, help="score the first N evaluation rows only")
    parser.add_argument("--keep", action="store_true", help="keep the quantized files")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds that a run may take")
    return parser


def stored(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier call."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def main() -> None:
    """Run what is missing; the table goes to stdout too."""
    parser = common(__doc__)
    parser.add_argument(
        "--models", nargs="+", default=["repnet_cifar10_train", "resnet20_cifar10_bn", "mbv2_cifar10_bn"]
    )
    parser.add_argument("--bits", nargs="+", default=["W8A8", "W6A6", "W4A8", "W4A4"], metavar="WnAn")
    parser.add_argument("--ranges", nargs="+", default=["minmax", "percentile", "mse", "mae"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--steps", nargs="+", default=["channel", "tensor"], choices=("channel", "tensor"))
    parser.add_argument("--stress", nargs="+", default=list(STRESS), choices=STRESS)
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "repapq.jsonl"
    rows = stored(path)
    known = {Run(**{name: row[name] for name in Run.__dataclass_fields__}) for row in rows}
    chosen: dict[tuple[str, str], Subject] = {}
    for subject in subjects(args.models, args.out):
        subject.write_feeds(args.samples, args.out / "logs" / f"{subject.name}.feeds")
        chosen |= {(subject.name, stress): stressed(subject, stress, args.out) for stress in args.stress}
    keys = ("model", "stress", "bits", "steps", "ranges", "way")
    for run_ in planned(args.models, args):
        if run_ in known:
            continue
        print(run_.label, file=sys.stderr, flush=True)
        rows.append(measured(run_, chosen[run_.model, run_.stress], args))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        (args.out / "repapq.md").write_text(table(rows, keys), encoding="utf-8")
    print(table(rows, keys))


if __name__ == "__main__":
    main()
