"""What `harden` gives without labels: hardened on a few hundred images, quantized to few bits, scored on real ones.

    ONNXQ_ASSETS=DIR python benchmarks/harden.py --out DIR [--models NAME ...] [--seeds 0 1 2] [--samples 512]
        [--methods rounding moments adaquant advanced] [--bits 4 3 2] [--workers 2]

Every model is hardened once per seed for weights with a step per channel and once for a single step, and both, and the
original, are quantized in both ways. Weights of all layers but the first and last get few bits, activations 8. Methods
are those of r2.py, which trains with labels. DIR gets the hardened files, and harden.json and harden.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from r2 import METHODS, Job, assets, jobs_of, score, table

ORIGINAL = "original"
AIMS = {"harden": True, "harden --per-tensor": False}
"""Variant -> whether it is hardened for a step per channel."""


def hardened(path: Path, out: Path, seed: int, args: argparse.Namespace) -> list[tuple[str, Path]]:
    """Harden one model for both kinds of steps; returns the variants and their files."""
    from onnxq import graph
    from onnxq.pipeline.harden import HardenSettings, harden

    names = [spec[0] for spec in graph.input_specs(graph.load(path))]
    feeds = list(assets().calibration(assets().task_of(path.stem), names, args.samples))
    found = []
    for variant, per_channel in AIMS.items():
        file = out / f"{path.stem}.{'channel' if per_channel else 'tensor'}-{seed}.onnx"
        if not file.exists():
            print(file.name, file=sys.stderr, flush=True)
            harden(path, feeds, HardenSettings(per_channel=per_channel, seed=seed, samples=args.samples)).save(file)
        found.append((variant, file))
    return found


def jobs(path: Path, args: argparse.Namespace) -> list[Job]:
    """Everything to score for one model; what is not random runs once on the original."""
    found = []
    for seed in args.seeds:
        for variant, file in hardened(path, args.out, seed, args):
            found += jobs_of(variant, seed, file, args)
        first = seed == args.seeds[0]
        found += [job for job in jobs_of(ORIGINAL, seed, path, args) if first or _is_random(job)]
    return found


def _is_random(job: Job) -> bool:
    return bool(METHODS.get(job.method, {}).keys() - {"bn_tuning"})


def main() -> None:
    """Harden, quantize, score, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=["resnet20_cifar10_bn", "mbv2_cifar10_bn"])
    parser.add_argument("--methods", nargs="+", default=["rounding", "moments"], choices=list(METHODS))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--samples", type=int, default=512, help="rows to harden and to calibrate with (default: 512)")
    parser.add_argument("--rows", type=int, default=10_000, help="test images")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    text, rows = "", []
    for name in args.models:
        path = Path(os.environ["ONNXQ_ASSETS"]) / "models" / f"{name}.onnx"
        task = assets().task_of(name)
        with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            futures = {job: pool.submit(score, job, task, args.rows, args.samples) for job in jobs(path, args)}
            scores = {job: future.result() for job, future in futures.items()}
        text += f"### {name}, seeds {args.seeds}\n\n{table(scores, [ORIGINAL, *AIMS])}\n\n"
        rows += [{"model": name, **job.__dict__, "top1": value} for job, value in scores.items()]
        (args.out / "harden.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
        (args.out / "harden.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
