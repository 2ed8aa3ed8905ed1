"""Transformers: what few bits cost with every way to calibrate, and what integers gain in time.

    ONNXQ_ASSETS=DIR python benchmarks/transformers.py accuracy --out DIR [--models NAME ...] [--bits W4A4 ...]
                                                       [--ways NAME ...] [--samples 512] [--limit 10000]
    ONNXQ_ASSETS=DIR python benchmarks/transformers.py latency --out DIR [--models NAME ...] [--quantizers NAME ...]
                                                       [--threads 1 2] [--sequences 16 64 256] [--seconds 6]
    ONNXQ_ASSETS=DIR python benchmarks/transformers.py layers --out DIR [--models NAME ...] [--threads 1 2]

accuracy: up to 6 activation bits every way quantizes queries, keys, values and probabilities, too; with 8 all leave
them in float. DIR gets transformers.jsonl, a row per run, and transformers.md; a run that the former has already is not
repeated. latency: every file against the float model in interleaved pairs, see latency.py; DIR gets latency.md.
layers: milliseconds of each kind of layer in float and in integers, from the runtime's profile; DIR gets layers.md.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lowbit import table
from process import ChildError, ask, run
from rivals import QUANTIZERS, command, environment
from scoring import Subject
from w8a8 import subjects

HERE = Path(__file__).resolve().parent
MODELS = ("convt_ashu_cifar10", "minilm_l6")
TOKENS = ("minilm_l6",)
"""Models whose rows may have any length."""
PLAIN = {"preset": "balanced", "bn_tuning": False, "attention": "auto", "migrate_norms": False}
WAYS: Mapping[str, Mapping[str, object]] = {
    "min-max": {"preset": "fast", "attention": "auto", "softmax": "uniform"},
    "calibrated": {**PLAIN, "softmax": "uniform"},
    "log-sqrt2": PLAIN,
    "migrated": {"preset": "repq-vit", "bn_tuning": False, "softmax": "uniform"},
    "repq-vit": {"preset": "repq-vit"},
    "repq-vit-adaquant": {"preset": "repq-vit", "reconstruction": "adaquant"},
}
BITS = ("W8A8", "W6A6", "W4A8", "W4A4")
PRODUCTS = "onnxq-int8-attention"
"""The default with the products of attention in integers."""


@dataclass(frozen=True)
class Run:
    """One call of `onnxq quantize`."""

    model: str
    bits: str
    first_last: int
    samples: int
    way: str

    @property
    def label(self) -> str:
        """A file name."""
        return f"{self.model}.{self.bits}.f{self.first_last}.n{self.samples}.{self.way}"

    @property
    def recipe(self) -> Mapping[str, object]:
        """Its fields."""
        found = re.fullmatch(r"W(\d+)A(\d+)", self.bits)
        assert found is not None, self.bits
        bits = {"weight_bits": int(found[1]), "activation_bits": int(found[2]), "first_last": self.first_last}
        return {**WAYS[self.way], **bits, "samples": self.samples}


def quantize(subject: Subject, recipe: Mapping[str, object], label: str, args: argparse.Namespace) -> tuple[Path, Any]:
    """The file that onnxq makes with a recipe, and how the command ended."""
    out = args.out / "models" / f"{label}.onnx"
    path = args.out / "logs" / f"{label}.toml"
    for folder in (out.parent, path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in recipe.items()), encoding="utf-8")
    argv = [*command("onnxq", subject.model, subject.feeds, out), "--recipe", str(path), "--no-timing"]
    return out, run(argv, args.out / "logs" / label, args.timeout, environment())


def measured(run_: Run, subject: Subject, args: argparse.Namespace) -> dict[str, Any]:
    """Quantize and score once."""
    out, finished = quantize(subject, run_.recipe, run_.label, args)
    row: dict[str, Any] = {**asdict(run_), "cost": asdict(finished.cost)}
    if finished.status != 0:
        return {**row, "message": finished.complaint}
    try:
        score = subject.score(out, args.limit, args.out / "logs" / f"{run_.label}.score")
    except ChildError as error:
        return {**row, "message": str(error)}
    return {**row, "score": asdict(score), "bytes": out.stat().st_size}


def accuracy(chosen: Mapping[str, Subject], args: argparse.Namespace) -> str:
    """Run what is missing."""
    path = args.out / "transformers.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    known = {Run(**{name: row[name] for name in Run.__dataclass_fields__}) for row in rows}
    wanted = [
        Run(name, bits, args.first_last, args.samples, way)
        for name in chosen
        for bits in args.bits
        for way in args.ways
    ]
    for run_ in wanted:
        if run_ in known:
            continue
        print(run_.label, file=sys.stderr, flush=True)
        rows.append(measured(run_, chosen[run_.model], args))
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        (args.out / "transformers.md").write_text(table(rows), encoding="utf-8")
    return table(rows)


def latency(chosen: Mapping[str, Subject], args: argparse.Namespace) -> str:
    """Quantize with every quantizer and time the files; markdown."""
    heads = [f"{threads} thread{'s'[: threads > 1]}" for threads in args.threads]
    lines = [f"| model | tokens | quantizer | {' | '.join(heads)} |", "| --- " * (3 + len(heads)) + "|"]
    for name, subject in chosen.items():
        for quantizer in args.quantizers:
            print(f"{name}: {quantizer}", file=sys.stderr, flush=True)
            out, complaint = written(subject, quantizer, args)
            for length in args.sequences if name in TOKENS else [0]:
                cells = [complaint or timed(subject, out, threads, length, args) for threads in args.threads]
                lines.append(f"| {' | '.join((name, str(length or '-'), quantizer, *cells))} |")
            (args.out / "latency.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "\n".join(lines) + "\n"


def written(subject: Subject, quantizer: str, args: argparse.Namespace) -> tuple[Path, str]:
    """The file of one quantizer, and its complaint where there is none."""
    label = f"{subject.name}.{quantizer}"
    if quantizer in ("onnxq", PRODUCTS):
        recipe = {"attention": "8"} if quantizer == PRODUCTS else {}
        out, finished = quantize(subject, recipe, label, args)
    else:
        out = args.out / "models" / f"{label}.onnx"
        out.parent.mkdir(parents=True, exist_ok=True)
        argv = command(quantizer, subject.model, subject.feeds, out)
        finished = run(argv, args.out / "logs" / label, args.timeout, environment())
    return out, "" if finished.status == 0 else finished.complaint


def timed(subject: Subject, model: Path, threads: int, length: int, args: argparse.Namespace) -> str:
    """Time of the file / time of the float model, with the quartiles."""
    argv = [sys.executable, str(HERE / "latency.py"), str(subject.model), str(model), "--data", str(subject.feeds)]
    argv += ["--threads", str(threads), "--seconds", str(args.seconds), "--sequence", str(length)]
    try:
        found = ask(argv, args.out / "logs" / f"{model.stem}.{length}.t{threads}", args.timeout)
    except ChildError as error:
        return str(error)
    return f"{found['ratio']:.2f} ({found['ratio_q1']:.2f}-{found['ratio_q3']:.2f})"


def layers(chosen: Mapping[str, Subject], args: argparse.Namespace) -> str:
    """What each kind of layer takes in float and in integers; markdown. Nothing else may run in this process."""
    from latency import single_rows

    from onnxq.pipeline.timing import latency_costs
    from onnxq.types.mixed import BASE, FLOAT

    lines = ["| model | tokens | threads | layers | float ms | integer ms | ratio |", "| --- " * 7 + "|"]
    for name, subject in chosen.items():
        found = calibrated(subject)
        for length in args.sequences if name in TOKENS else [0]:
            feeds = single_rows(subject.feeds, length)[0]
            for threads in args.threads:
                costs, _ = latency_costs(found, [BASE, FLOAT], feeds, threads=threads)
                kinds: dict[str, list[Mapping[tuple[int, int], float]]] = {}
                for layer, prices in costs.layers.items():
                    kinds.setdefault(re.sub(r"^.*\.\d+/", "", layer), []).append(prices)
                for kind, prices_of in kinds.items():
                    slow, quick = (sum(prices[bits] for prices in prices_of) for bits in (FLOAT, BASE))
                    ratio = f"{quick / slow:.2f}" if slow else "-"
                    cells = (name, str(length or "-"), str(threads), f"{len(prices_of)} x {kind}")
                    lines.append(f"| {' | '.join(cells)} | {slow:.3f} | {quick:.3f} | {ratio} |")
    (args.out / "layers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return "\n".join(lines) + "\n"


def calibrated(subject: Subject) -> Any:
    """The model (`onnxq.pipeline.calibrated.Calibrated`) with min-max ranges of a few rows."""
    from onnxq.calibrate import open_data
    from onnxq.pipeline.calibrated import Calibrated
    from onnxq.pipeline.planning import choose_ranges, observe, precision_of
    from onnxq.pipeline.prepare import load_float, model_inputs, prepare
    from onnxq.recipe import resolve
    from onnxq.types import Silence

    settings = resolve("fast", samples=32)
    loaded = load_float(subject.model)
    rows = open_data(str(subject.feeds), model_inputs(loaded), samples=settings.samples)
    model = prepare(subject.model, loaded).model
    placement, seen = observe(model, rows, settings, Silence())
    ranges = choose_ranges(model, placement, seen, rows, settings, Silence())
    return Calibrated(model, placement, {8: ranges}, precision_of(settings, placement))


def options() -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("part", choices=("accuracy", "latency", "layers"))
    parser.add_argument("--out", type=Path, required=True, help="folder for results, files and logs")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--bits", nargs="+", default=list(BITS), metavar="WnAn")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--first-last", type=int, default=8)
    parser.add_argument("--samples", type=int, default=512, help="calibration rows (default: 512)")
    parser.add_argument("--limit", type=int, help="score the first N evaluation rows only")
    every = (*QUANTIZERS, PRODUCTS)
    parser.add_argument("--quantizers", nargs="+", default=list(every), choices=every)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--sequences", nargs="+", type=int, default=[16, 64, 256], help="tokens of a row")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for one latency ratio (default: 6)")
    parser.add_argument("--timeout", type=float, default=7200.0, help="seconds that a run may take")
    return parser.parse_args()


def main() -> None:
    """Run one part; the table goes to stdout too."""
    args = options()
    args.out = args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    chosen: dict[str, Subject] = {subject.name: subject for subject in subjects(args.models, args.out)}
    for name, subject in chosen.items():
        subject.write_feeds(args.samples, args.out / "logs" / f"{name}.feeds")
    parts = {"accuracy": accuracy, "latency": latency, "layers": layers}
    print(parts[args.part](chosen, args))


if __name__ == "__main__":
    main()
