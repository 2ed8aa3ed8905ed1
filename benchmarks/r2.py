"""Range regularisation (R2-Loss) on a real network: fine-tuned with and without it, then quantized to few bits.

    ONNXQ_ASSETS=DIR python benchmarks/r2.py --out DIR [--epochs 8] [--seeds 0 1 2] [--device cuda] [--workers 16]
        [--variants none margin margin:channel@0.05 soft-min-max] [--methods rounding moments adaquant advanced]

Every variant starts from the same ONNX file, BatchNormalization folded, imported into torch, and sees the same images
in the same order for a seed: cross-entropy on the labels of the CIFAR-10 training JPEGs, plus the range loss of
the variant, KIND[:channel][@STRENGTH] (ranges over whole weights unless `:channel`). The result is written back to
ONNX, quantized in other processes, and scored on the test JPEGs. Weights of all layers but the first and last get few
bits, activations 8. DIR gets the float files with what was logged about each, scores.jsonl and r2.md; what is there is
not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# A further method is a further line: fields of a recipe beside the bits.
METHODS: dict[str, dict[str, object]] = {
    "rounding": {"bn_tuning": False},
    "moments": {},
    "adaquant": {"reconstruction": "adaquant"},
    "adaround": {"reconstruction": "adaround"},
    "advanced": {"recipe": "advanced"},
}
CODEBOOK_BITS = (2, 1)
TRAIN_PACK = "cifar10/cifar10_train_jpg.npz"


@dataclass(frozen=True)
class Variant:
    """One way to train: no range loss where `kind` is "none"."""

    name: str
    kind: str
    per_channel: bool
    strength: float

    @classmethod
    def parse(cls, text: str, strength: float) -> Variant:
        """From KIND[:channel][@STRENGTH]."""
        rest, _, given = text.partition("@")
        kind, _, scales = rest.partition(":")
        return cls(text, kind, scales == "channel", float(given) if given else strength)


@dataclass(frozen=True)
class Job:
    """One quantized model to score; `method` is one of METHODS, "codebook" or "float"."""

    variant: str
    seed: int
    method: str
    bits: int
    per_channel: bool
    path: str


def assets() -> Any:
    """The module that knows images and preprocessing of the assets."""
    sys.path.insert(0, os.environ["ONNXQ_ASSETS"])
    import evaluate

    return evaluate


def augmented(x: torch.Tensor) -> torch.Tensor:
    """Half of the images mirrored, all moved by up to 4 pixels; mirrored borders fill in."""
    import torch

    count, _, height, width = x.shape
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4), mode="reflect")
    top, left = torch.randint(0, 9, (2, count, 1), device=x.device)
    rows = top + torch.arange(height, device=x.device)
    columns = torch.arange(width, device=x.device).expand(count, -1)
    mirrored = torch.rand(count, 1, device=x.device) < 0.5
    columns = left + torch.where(mirrored, width - 1 - columns, columns)
    picked = padded[torch.arange(count, device=x.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2)


def train(model: Any, variant: Variant, seed: int, data: tuple[Any, ...], args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune one copy of `model`; returns the trained ONNX model and what was logged."""
    import torch

    from onnxq.train import Imported, R2Loss, ranges_of

    x, labels = data
    net = Imported(model).to(x.device)
    r2 = None
    if variant.kind != "none":
        r2 = R2Loss(net, variant.kind, strength=variant.strength, per_channel=variant.per_channel, warm_up=args.warm_up)
    sizes = [(value, max(float(value.detach().square().mean().sqrt()), 1e-6)) for value in net.parameters()]
    optimizer = torch.optim.Adam([{"params": [value], "lr": args.rate * size, "size": size} for value, size in sizes])
    torch.manual_seed(seed)
    steps, done, began, log = args.epochs * (len(x) // args.batch), 0, time.perf_counter(), []
    for _ in range(args.epochs):
        seen = torch.zeros(2, device=x.device)
        for chosen in torch.randperm(len(x), device=x.device).split(args.batch):
            if len(chosen) < args.batch:
                break
            for group in optimizer.param_groups:
                group["lr"] = args.rate * group["size"] * 0.5 * (1 + math.cos(math.pi * done / steps))
            logits = net({net.inputs[0]: augmented(x[chosen])})[net.outputs[0]]
            task = torch.nn.functional.cross_entropy(logits.flatten(1), labels[chosen])
            narrow = torch.zeros_like(task)
            if r2 is not None:
                r2.step(done / steps)
                narrow = r2()
            optimizer.zero_grad(set_to_none=True)
            (task + narrow).backward()
            optimizer.step()
            seen += torch.stack([task.detach(), narrow.detach()])
            done += 1
        log.append((seen / (steps // args.epochs)).tolist())
        print(f"{variant.name} seed {seed}: loss {log[-1][0]:.4f} + {log[-1][1]:.4f}", file=sys.stderr, flush=True)
    ranges = ranges_of(net.ranged_weights())
    return {
        "model": net.cpu().written(model),
        "losses": log,
        "seconds": time.perf_counter() - began,
        "per_tensor": statistics.mean(entry.per_tensor for entry in ranges),
        "per_channel": statistics.mean(entry.per_channel for entry in ranges),
        "layers": {entry.name: (entry.per_tensor, entry.per_channel) for entry in ranges},
    }


def accuracy(model: Any, task: str, rows: int) -> float:
    """Top-1 in percent on the first `rows` test images."""
    from onnxq.runtime import Session, SessionConfig

    known = assets()
    pixels, labels = known.images(known.IMAGE_TASKS[task][0], "eval", rows, None)
    session = Session(model, SessionConfig(threads=1))
    hits = 0
    for start in range(0, len(pixels), 100):
        feeds = {session.inputs[0].name: known.preprocess(pixels[start : start + 100], task)}
        logits = next(iter(session.run(feeds).values())).reshape(len(feeds[session.inputs[0].name]), -1)
        hits += int((logits.argmax(1) == labels[start : start + 100]).sum())
    return 100.0 * hits / len(labels)


def score(job: Job, task: str, rows: int, samples: int) -> float:
    """Quantize as `job` says, and top-1 in percent; runs in a process of its own."""
    import onnxq
    from onnxq import graph

    if job.method == "float":
        return accuracy(Path(job.path), task, rows)
    changes = dict(METHODS.get(job.method, {}))
    changes["weight_bits" if job.method in METHODS else "codebook_bits"] = job.bits
    names = [spec[0] for spec in graph.input_specs(graph.load(job.path))]
    feeds = list(assets().calibration(task, names, samples))
    made = onnxq.quantize(
        job.path,
        feeds,
        changes.pop("recipe", None),
        per_channel=job.per_channel,
        seed=job.seed,
        checks=onnxq.Checks(verify=False),
        **changes,
    )
    return accuracy(made.model, task, rows)


def jobs_of(variant: str, seed: int, path: Path, args: argparse.Namespace) -> list[Job]:
    """Everything to score for one trained model."""
    found = [Job(variant, seed, "float", 32, True, str(path))]
    for per_channel in (False, True):
        found += [
            Job(variant, seed, method, bits, per_channel, str(path)) for method in args.methods for bits in args.bits
        ]
        found += [Job(variant, seed, "codebook", bits, per_channel, str(path)) for bits in CODEBOOK_BITS]
    return found


def table(scores: dict[Job, float], variants: Sequence[str]) -> str:
    """Markdown: top-1 per method and variant, mean and spread over seeds, and the gain over the first variant."""
    lines = ["| quantization | " + " | ".join(variants) + " |", "| --- |" + " ---: |" * len(variants)]
    cases = dict.fromkeys((job.method, job.bits, job.per_channel) for job in scores)
    for method, bits, per_channel in cases:
        case = {(job.variant, job.seed): top1 for job, top1 in scores.items()
                if (job.method, job.bits, job.per_channel) == (method, bits, per_channel)}  # fmt: skip
        columns = [[top1 for (name, _), top1 in case.items() if name == variant] for variant in variants]
        scales = "channel" if per_channel else "tensor"
        title = "float" if method == "float" else f"{method} W{bits}A8 per {scales}"
        cells = [_cell(column, columns[0] if index else None) for index, column in enumerate(columns)]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float], base: list[float] | None) -> str:
    """Mean and spread; a gain beyond twice the larger spread in bold."""
    spreads = [statistics.stdev(side) for side in (values, base or []) if len(side) > 1]
    text = f"{statistics.mean(values):.2f}" + (f" ± {spreads[0]:.2f}" if spreads else "")
    if base is None:
        return text
    gain = statistics.mean(values) - statistics.mean(base)
    clear = bool(spreads) and abs(gain) > 2 * max(spreads)
    return f"{text} (**{gain:+.2f}**)" if clear else f"{text} ({gain:+.2f})"


def main() -> None:
    """Train all variants, score them in parallel, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="resnet20_cifar10_bn")
    parser.add_argument("--variants", nargs="+", default=["none", "margin"], metavar="KIND[:channel][@STRENGTH]")
    parser.add_argument("--methods", nargs="+", default=["rounding", "moments"], choices=list(METHODS))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--strength", type=float, default=0.03, help="where a variant gives none")
    parser.add_argument("--warm-up", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rate", type=float, default=3e-3, help="of Adam, in units of each weight's root mean square")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--images", type=int, help="most training images")
    parser.add_argument("--rows", type=int, default=10_000, help="test images")
    parser.add_argument("--samples", type=int, default=256, help="calibration rows")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run(args)


def run(args: argparse.Namespace) -> None:
    """The benchmark with parsed arguments."""
    import torch

    from onnxq import graph, passes
    from onnxq.pipeline.harden import LATER
    from onnxq.pipeline.prepare import load_float, prepare

    path = Path(os.environ["ONNXQ_ASSETS"]) / "models" / f"{args.model}.onnx"
    task = assets().task_of(args.model)
    model = prepare(path, load_float(path), rewrites=passes.rewrites(without=LATER)).model
    pixels, labels = assets().images(TRAIN_PACK, "train", args.images, None)
    data = tuple(torch.from_numpy(part).to(args.device) for part in (assets().preprocess(pixels, task), labels))
    variants = [Variant.parse(text, args.strength) for text in args.variants]
    trained: dict[str, Any] = {}
    known = read_scores(args.out / "scores.jsonl")
    context = multiprocessing.get_context("spawn")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the workers; this process has read it already
    with ProcessPoolExecutor(args.workers, mp_context=context) as pool:
        futures, wanted = {}, []
        for seed in args.seeds:
            for variant in variants:
                file = args.out / f"{variant.name.replace(':', '_').replace('@', '_')}-{seed}.onnx"
                logged = file.with_suffix(".json")
                if not logged.exists():
                    found = train(model, variant, seed, data, args)
                    graph.save(found.pop("model"), file)
                    logged.write_text(json.dumps(found, indent=1), encoding="utf-8")
                trained[f"{variant.name} {seed}"] = json.loads(logged.read_text(encoding="utf-8"))
                for job in jobs_of(variant.name, seed, file, args):
                    wanted.append(job)
                    if job not in known:
                        futures[job] = pool.submit(score, job, task, args.rows, args.samples)
                        futures[job].add_done_callback(partial(keep_score, args.out / "scores.jsonl", job))
    scores = {job: known[job] if job in known else futures[job].result() for job in wanted}
    write(trained, scores, [variant.name for variant in variants], args)


def keep_score(path: Path, job: Job, found: Future[float]) -> None:
    """Append a score to `path`, unless there is none."""
    if not found.cancelled() and found.exception() is None:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({**asdict(job), "top1": found.result()}) + "\n")


def read_scores(path: Path) -> dict[Job, float]:
    """What an earlier call has scored."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines]
    return {Job(**{name: row[name] for name in Job.__dataclass_fields__}): row["top1"] for row in rows}


def write(trained: dict[str, Any], scores: dict[Job, float], names: Sequence[str], args: argparse.Namespace) -> None:
    """The results as markdown, which is printed, too."""
    text = f"### {args.model}, {args.epochs} epochs, seeds {args.seeds}\n\n{table(scores, names)}\n\n"
    for name in names:
        runs = [found for key, found in trained.items() if key.rsplit(" ", 1)[0] == name]
        whole, channels = (statistics.mean(found[key] for found in runs) for key in ("per_tensor", "per_channel"))
        text += f"- {name}: mean max|W|/std {whole:.2f} over whole weights, {channels:.2f} per channel\n"
    (args.out / "r2.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
