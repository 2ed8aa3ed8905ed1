"""AQuant: what learned rounding borders give on top of other methods, and on top of matched moments.

    ONNXQ_ASSETS=DIR python benchmarks/borders.py --out DIR [--models NAME ...] [--bits W4A4 ...] [--bases NAME ...]
        [--kinds none constant affine quadratic] [--moments no yes] [--seeds 0 1 2] [--iterations 300]

Every base (AdaRound; AdaRound with half of the activations left unrounded while learning, "qdrop"; AdaQuant) is learned
block by block, alone, with borders learned behind it in every block, and, for AdaRound, with borders learned together
with the rounding ("joint"); each without and with means and spreads matched: in front of the borders, as behind them
that takes straight ones back. Quadratic borders are simulated. The gain over `none` at the same base and moments is
what matters; latency.py compares two files that `--keep` has left.

DIR gets borders.jsonl, a row per run, and borders.md; a run that borders.jsonl has already is not repeated. See w8a8.py
for the models.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from repapq import common, quantized, stored, table
from scoring import Subject
from w8a8 import subjects

KINDS = ("none", "constant", "affine", "quadratic")
BASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "adaround": ("adaround", {"drop": 0.0}),
    "qdrop": ("adaround", {"drop": 0.5}),
    "adaquant": ("adaquant", {}),
    "joint": ("aquant", {"weights": "joint"}),
}


@dataclass(frozen=True)
class Run:
    """One quantized file."""

    model: str
    bits: str
    base: str
    kind: str
    moments: str
    stage: float
    iterations: int
    samples: int
    seed: int

    @property
    def label(self) -> str:
        """A file name."""
        return "_".join(str(part) for part in asdict(self).values())

    @property
    def methods(self) -> list[tuple[str, Mapping[str, Any]]]:
        """Those of each block."""
        name, given = BASES[self.base]
        mine = {"iterations": self.iterations, **given}
        border = {"kind": self.kind, "stage": self.stage}
        if self.base == "joint":
            return [(name, {**mine, **border})]
        found: list[tuple[str, Mapping[str, Any]]] = [(name, mine)]
        if self.moments == "yes":
            found.append(("moments", {}))
        if self.kind != "none":
            found.append(("aquant", {"iterations": self.iterations, "weights": "keep", **border}))
        return found


def planned(names: Sequence[str], args: Any) -> list[Run]:
    """All runs; joint learning has always borders, and nothing behind it."""
    return [
        Run(name, bits, base, kind, moments, args.stage, args.iterations, args.samples, seed)
        for name in names
        for bits in args.bits
        for base in args.bases
        for kind in args.kinds
        if base != "joint" or kind != "none"
        for moments in args.moments
        if base != "joint" or moments == "no"
        for seed in args.seeds
    ]


def measured(run_: Run, subject: Subject, args: Any) -> dict[str, Any]:
    """Quantize and score once."""
    found = re.fullmatch(r"W(\d+)A(\d+)", run_.bits)
    assert found is not None, run_.bits
    recipe = {
        "weight_bits": int(found[1]),
        "activation_bits": int(found[2]),
        "samples": run_.samples,
        "seed": run_.seed,
        "ranges": "mse",
    }
    return {**asdict(run_), **quantized(subject, run_.label, recipe, run_.methods, args)}


def main() -> None:
    """Run what is missing; the table goes to stdout too."""
    parser = common(__doc__)
    parser.add_argument("--models", nargs="+", default=["resnet20_cifar10_bn", "repnet_cifar10_train"])
    parser.add_argument("--bits", nargs="+", default=["W4A4", "W3A3", "W2A4", "W2A2"], metavar="WnAn")
    parser.add_argument("--bases", nargs="+", default=list(BASES), choices=BASES)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--moments", nargs="+", default=["no", "yes"], choices=("no", "yes"))
    parser.add_argument("--stage", type=float, default=0.0, help="weight of the stage's error for borders (default: 0)")
    args = parser.parse_args()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "borders.jsonl"
    rows = stored(path)
    known = {Run(**{name: row[name] for name in Run.__dataclass_fields__}) for row in rows}
    chosen = {subject.name: subject for subject in subjects(args.models, args.out)}
    for name, subject in chosen.items():
        subject.write_feeds(args.samples, args.out / "logs" / f"{name}.feeds")
    keys = ("model", "bits", "base", "kind", "moments", "stage", "iterations")
    for run_ in planned(list(chosen), args):
        if run_ in known:
            continue
        print(run_.label, file=sys.stderr, flush=True)
        rows.append(measured(run_, chosen[run_.model], args))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        (args.out / "borders.md").write_text(table(rows, keys), encoding="utf-8")
    print(table(rows, keys))


if __name__ == "__main__":
    main()
