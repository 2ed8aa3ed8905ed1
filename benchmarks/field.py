"""Against the field: onnxq's presets and every rival on real models, from the same rows, measured by one onnxruntime.

    python benchmarks/rival_environments.py --environments DIR
    ONNXQ_ASSETS=DIR python benchmarks/field.py --out DIR --environments DIR [--models NAME|FILE.onnx ...]
        [--quantizers NAME ...] [--bits W8A8 ...] [--first-last 8|same] [--samples 512] [--limit N] [--seconds 6]

Every quantizer runs in an environment and a process of its own, whose time and peak memory are measured; sums and what
no layer reads have 8 bits. The files are scored, and then timed against the float files in interleaved pairs, which
`--seconds 0` leaves for a later call. DIR gets field.json, a row per file, and field.md; a row that field.json has
already is not repeated (`--again` repeats those that failed). What fails becomes a row with its message. See w8a8.py
for the models.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from contestants import CONTESTANTS, command, recipe, split
from process import ChildError, ask, run
from rival_environments import ENVIRONMENTS, state
from rivals import environment
from scoring import Subject
from standings import markdown
from w8a8 import MODELS, subjects, surroundings

HERE = Path(__file__).resolve().parent
BITS = ("W8A8", "W6A6", "W4A8", "W4A4", "W2A4")
Row = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One file to make; `limit` is the number of evaluation rows, None for all of them."""

    model: str
    bits: str
    first_last: str
    quantizer: str
    samples: int
    limit: int | None

    @property
    def label(self) -> str:
        """A file name."""
        return f"{self.model}.{self.bits}.f{self.first_last}.n{self.samples}.{self.quantizer}"

    def made(self, row: Row) -> bool:
        """Whether a row of field.json is of this run."""
        return all(row.get(key) == value for key, value in asdict(self).items())


def planned(models: Iterable[str], args: argparse.Namespace) -> list[Run]:
    """The float files and all files to make. At 8 bits the policies of the first and last layer are one."""
    runs = []
    for model in models:
        runs.append(Run(model, "float", "8", "float", args.samples, args.limit))
        for bits in args.bits:
            policy = args.first_last if min(split(bits)) < 8 else "8"
            names = (name for name in args.quantizers if bits in CONTESTANTS[name].bits)
            runs += [Run(model, bits, policy, name, args.samples, args.limit) for name in names]
    return runs


def missing(runs: Sequence[Run], rows: list[Row], again: bool) -> list[Run]:
    """The runs without a row; with `again`, those whose row failed too, and these rows are removed."""
    if again:
        rows[:] = [row for row in rows if row["status"] == "ok" or not any(one.made(row) for one in runs)]
    return [one for one in runs if not any(one.made(row) for row in rows)]


def measured(one: Run, subject: Subject, args: argparse.Namespace) -> Row:
    """Make one file, count its kernels and score it."""
    row: Row = {**asdict(one), "status": "failed", "message": "", "versions": {}}
    log = args.out / "logs" / one.label
    try:
        calibrate(subject, args)
    except ChildError as error:
        return {**row, "message": str(error)}
    out = subject.model
    if one.quantizer != "float":
        out = args.out / "models" / f"{one.label}.onnx"
        row["versions"], row["message"] = versions(one.quantizer, args.environments)
        if row["message"] or not quantized(one, subject, out, row, args):
            return row
    row["bytes"], row["status"] = out.stat().st_size, "unusable"  # until it has run
    try:
        row["kernels"] = ask([sys.executable, str(HERE / "kernels.py"), str(out)], log.with_name(f"{log.name}.kernels"))
        row["score"] = asdict(subject.score(out, one.limit, log.with_name(f"{log.name}.score")))
        row["status"] = "ok"
    except ChildError as error:
        row["message"] = str(error)
    return row


def versions(quantizer: str, folder: Path) -> tuple[dict[str, str], str]:
    """The versions of what a quantizer consists of; a message where its environment cannot be used."""
    name = CONTESTANTS[quantizer].environment
    if not name:
        return dict(surroundings()["packages"]), ""  # type: ignore[call-overload]
    installed, message = state(folder, name)
    wanted = ENVIRONMENTS[name].requirements + ENVIRONMENTS[name].alone
    pinned = {requirement.split("==")[0] for requirement in wanted}
    return {package: version for package, version in installed.items() if package in pinned}, message


def quantized(one: Run, subject: Subject, out: Path, row: Row, args: argparse.Namespace) -> bool:
    """Run the quantizer; False, with its last words in the row, where it wrote no file."""
    log = args.out / "logs" / one.label
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    settings = CONTESTANTS[one.quantizer].settings
    out.with_suffix(".toml").write_text(recipe(one.bits, settings.get("preset", "balanced")), encoding="utf-8")
    model = prepared(subject, args) if CONTESTANTS[one.quantizer].prepared else subject.model
    argv = command(one.quantizer, one.bits, one.first_last, (model, subject.feeds, out), args.environments)
    finished = run(argv, log, args.timeout, environment())
    row["cost"] = asdict(finished.cost)
    if finished.status == 0 and out.is_file():
        return True
    row["message"] = finished.complaint if finished.status else "ended well, but wrote no file"
    return False


def prepared(subject: Subject, args: argparse.Namespace) -> Path:
    """The float file after quant_pre_process, made once; the file itself where that fails."""
    out: Path = args.out / "prepared" / f"{subject.name}.onnx"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        policy = {"weight_bits": 8, "activation_bits": 8, "first_last": None, "method": "prepare"}
        script = str(HERE / "adapters" / "with_onnxruntime.py")
        argv = [sys.executable, script, str(subject.model), str(subject.feeds), str(out), json.dumps(policy)]
        run(argv, args.out / "logs" / f"{subject.name}.prepared", args.timeout)
    return out if out.is_file() else subject.model


def timed(row: Row, subject: Subject, args: argparse.Namespace) -> dict[str, float]:
    """Time the file of a row against the float file, one thread."""
    label = f"{row['model']}.{row['bits']}.f{row['first_last']}.n{row['samples']}.{row['quantizer']}"
    out = args.out / "models" / f"{label}.onnx"
    argv = [sys.executable, str(HERE / "latency.py"), str(subject.model), str(out), "--data", str(subject.feeds)]
    return ask([*argv, "--seconds", str(args.seconds)], args.out / "logs" / f"{label}.t1", args.timeout)


def load(out: Path) -> list[Row]:
    """The rows of earlier calls."""
    path = out / "field.json"
    return list(json.loads(path.read_text(encoding="utf-8"))["rows"]) if path.is_file() else []


def save(rows: list[Row], out: Path) -> None:
    """Write the document and its tables."""
    document = {"schema": 1, "environment": surroundings(), "rows": rows}
    (out / "field.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (out / "field.md").write_text(markdown(rows), encoding="utf-8")


def options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, files and logs")
    parser.add_argument(
        "--environments", type=Path, default=Path("field-environments"), help="of rival_environments.py"
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--quantizers", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS, metavar="NAME")
    parser.add_argument("--bits", nargs="+", default=list(BITS), metavar="WnAn")
    parser.add_argument("--first-last", choices=("8", "same"), default="8", help="bits of the first and last layer")
    parser.add_argument("--samples", type=int, default=512, help="calibration rows (default: 512)")
    parser.add_argument("--limit", type=int, help="score the first N evaluation rows only")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for one latency ratio (default: 6; 0: none)")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that a quantizer may take")
    parser.add_argument("--again", action="store_true", help="repeat what failed")
    args = parser.parse_args(argv)
    args.out, args.environments = args.out.absolute(), args.environments.absolute()
    return args


def calibrate(subject: Subject, args: argparse.Namespace) -> None:
    """Write the calibration rows, once for all calls; a ChildError where that fails."""
    done = args.out / "logs" / f"{subject.name}.n{args.samples}.feeds"
    if subject.evaluator and not done.with_name(f"{done.name}.done").is_file():
        subject.write_feeds(args.samples, done)
        done.with_name(f"{done.name}.done").touch()


def play(chosen: Mapping[str, Subject], rows: list[Row], args: argparse.Namespace) -> None:
    """Make all files that are missing, then time those that were not yet."""
    runs = planned(chosen, args)
    for one in missing(runs, rows, args.again):
        print(one.label, file=sys.stderr, flush=True)
        rows.append(measured(one, chosen[one.model], args))
        save(rows, args.out)
    if args.seconds:
        wanted = (row for row in rows if row["status"] == "ok" and any(one.made(row) for one in runs))
        for row in (row for row in wanted if row["quantizer"] != "float" and "latency" not in row):
            try:
                row["latency"] = timed(row, chosen[row["model"]], args)
            except ChildError as error:
                row["message"] = str(error)
            save(rows, args.out)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing; the tables go to stdout too."""
    args = options(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    chosen = {one.name: one for one in subjects(args.models, args.out / f"n{args.samples}")}
    rows = load(args.out)
    play(chosen, rows, args)
    print(markdown(rows))


if __name__ == "__main__":
    main()
