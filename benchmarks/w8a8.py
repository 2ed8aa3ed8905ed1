"""8-bit quantizers side by side on real models: accuracy, integer kernels, latency, cost of quantizing.

    ONNXQ_ASSETS=DIR python benchmarks/w8a8.py --out DIR [--models NAME|FILE.onnx ...] [--quantizers NAME ...]

Every quantizer gets the same calibration feeds and runs in a process of its own, whose time and peak memory
are measured. The files are scored by `evaluate.py` of the assets, with the float model as the reference, and
timed against the float model in interleaved pairs. `FILE.onnx` is any model with a folder `FILE` of .npz
feeds beside it (`shaped.py` writes such): it needs no assets, and is scored by its first output on these.
A quantizer that fails becomes a row with its message. DIR gets w8a8.json, w8a8.md, the files and the logs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from process import ChildError, ask, run
from rivals import QUANTIZERS, command, environment, integer_coverage
from scoring import Subject
from tables import Result, Row, markdown

HERE = Path(__file__).resolve().parent
MODELS = (
    "resnet20_cifar10_bn",
    "resnet20_cifar10_folded",
    "mbv2_cifar10_bn",
    "repnet_cifar10_train",
    "squeezenet11_imagenet",
    "convt_ashu_cifar10",
    "vww96_mobilenetv1",
    "minilm_l6",
)


@dataclass(frozen=True)
class Settings:
    """What holds for every model and quantizer of a run."""

    out: Path
    limit: int | None
    samples: int
    threads: tuple[int, ...]
    seconds: float
    timeout_s: float


def subjects(names: list[str], out: Path) -> list[Subject]:
    """The models to quantize; ends the program with one line where one cannot be found."""
    assets = os.environ.get("ONNXQ_ASSETS")
    found = []
    for name in names:
        if name.endswith(".onnx"):
            path = Path(name)
            subject = Subject(path.stem, path, path.with_suffix(""), None)
        elif not assets or not (Path(assets) / "evaluate.py").is_file():
            stop("ONNXQ_ASSETS must name the folder of assets that holds evaluate.py, models/ and the data")
        else:
            model = Path(assets) / "models" / f"{name}.onnx"
            subject = Subject(name, model, out / "calibration" / name, Path(assets) / "evaluate.py")
        if not subject.model.is_file():
            stop(f"no model {name!r}: give a file ending in .onnx or one of {', '.join(MODELS)}")
        if not subject.evaluator and not any(subject.feeds.glob("*.npz")):
            stop(f"{name} has no .npz feeds in the folder {subject.feeds} beside it")
        found.append(subject)
    return found


def stop(message: str) -> None:
    """One line on stderr, exit code 2."""
    print(f"w8a8: {message}", file=sys.stderr)
    raise SystemExit(2)


def quantize(subject: Subject, quantizer: str, settings: Settings) -> Row:
    """Run one quantizer on one model, then score, count and time its file."""
    row = Row(quantizer)
    out = settings.out / "models" / f"{subject.name}.{quantizer}.onnx"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.unlink(missing_ok=True)
    log = settings.out / "logs" / f"{subject.name}.{quantizer}"
    argv = command(quantizer, subject.model, subject.feeds, out)
    finished = run(argv, log, settings.timeout_s, environment())
    row.cost = finished.cost
    if finished.status != 0 or not out.is_file():
        row.message = finished.complaint
        return row
    row.bytes = out.stat().st_size
    row.integer_coverage = reported_coverage(finished.stdout)
    row.status = "unusable"  # until it has run
    try:
        argv = [sys.executable, str(HERE / "kernels.py"), str(out)]
        row.kernels = ask(argv, log.with_name(f"{log.name}.kernels"))
        row.score = subject.score(out, settings.limit, log.with_name(f"{log.name}.score"))
        row.status = "ok"
        row.latency = [latency(subject, out, threads, settings, log) for threads in settings.threads]
    except ChildError as error:
        row.message = str(error)
    return row


def latency(subject: Subject, model: Path, threads: int, settings: Settings, log: Path) -> dict[str, float]:
    """Time the quantized file against the float file at one thread count."""
    argv = [sys.executable, str(HERE / "latency.py"), str(subject.model), str(model)]
    argv += ["--data", str(subject.feeds)]
    argv += ["--threads", str(threads), "--seconds", str(settings.seconds)]
    return ask(argv, log.with_name(f"{log.name}.t{threads}"), settings.timeout_s)


def reported_coverage(stdout: str) -> float | None:
    """Integer coverage from the JSON document that a quantizer may have printed."""
    try:
        return integer_coverage(json.loads(stdout))
    except json.JSONDecodeError:
        return None


def benchmark(
    subject: Subject, quantizers: list[str], settings: Settings, result: Result, changed: Callable[[], None]
) -> None:
    """Fill in the result of one model; `changed` is called after each step."""
    log = settings.out / "logs" / subject.name
    try:
        subject.write_feeds(settings.samples, log.with_name(f"{log.name}.feeds"))
        result.score = subject.score(subject.model, settings.limit, log.with_name(f"{log.name}.score"))
    except ChildError as error:
        result.message = str(error)
        changed()
        return
    for quantizer in quantizers:
        print(f"{subject.name}: {quantizer}", file=sys.stderr, flush=True)
        result.rows.append(quantize(subject, quantizer, settings))
        changed()


def save(results: list[Result], settings: Settings) -> None:
    """Write the JSON document and the tables."""
    document = {
        "schema": 1,
        "environment": surroundings(),
        "settings": {key: value for key, value in asdict(settings).items() if key != "out"},
        "models": [asdict(result) for result in results],
    }
    (settings.out / "w8a8.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (settings.out / "w8a8.md").write_text(markdown(results), encoding="utf-8")


def surroundings() -> dict[str, object]:
    """The machine and the packages that the figures depend on."""
    packages = {}
    for name in ("onnxq", "onnx", "onnxruntime", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    return {"python": platform.python_version(), "cpu": cpu(), "cores": os.cpu_count(), "packages": packages}


def cpu() -> str:
    """The processor's name and the vector extensions that int8 kernels use."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = facts.get("flags", "").split()
    wanted = ("avx2", "avx512bw", "avx512_vnni", "avx_vnni", "amx_int8")
    return " ".join([facts.get("model name", ""), *(flag for flag in wanted if flag in flags)]).strip()


def options(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, files and logs")
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=QUANTIZERS)
    parser.add_argument("--limit", type=int, help="score the first N evaluation rows only")
    parser.add_argument("--samples", type=int, default=256, help="calibration rows (default: 256)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="to time with (default: 1 2)")
    parser.add_argument("--seconds", type=float, default=6.0, help="time for one latency ratio (default: 6)")
    parser.add_argument("--timeout", type=float, default=3600.0, help="seconds that a quantizer may take")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run the benchmark; the tables go to stdout too."""
    args = options(argv)
    out = args.out.resolve()
    settings = Settings(out, args.limit, args.samples, tuple(args.threads), args.seconds, args.timeout)
    chosen = subjects(args.models, out)
    out.mkdir(parents=True, exist_ok=True)
    done: list[Result] = []
    for subject in chosen:
        done.append(Result(subject.name, subject.model.stat().st_size))
        benchmark(subject, args.quantizers, settings, done[-1], lambda: save(done, settings))
    print(markdown(done))


if __name__ == "__main__":
    main()
