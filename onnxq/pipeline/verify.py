"""Verification: does the emitted model run in integers, is it right, is it faster?

The user's own float file is the reference, on rows that calibration did not see, in the runtime at full optimisation.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from onnxq import bench, graph
from onnxq.calibrate.observe import count_rows, has_free_rows
from onnxq.graph import Model
from onnxq.pipeline.allocate import written_bytes
from onnxq.pipeline.prepare import Prepared, probe_of
from onnxq.recipe import Recipe
from onnxq.runtime import PROVIDERS, Session, SessionConfig, available_providers
from onnxq.types import Array, Coverage, Dataset, Feeds, FloatNode, Formed, Latency, Log, Placed, QuantPlan, Verdict
from onnxq.types.target import TARGETS, Target

COMPARED_ROWS = 256
UNTIMED = "not timed"
SLACK = 1.02
"""A latency that is this much above the limit is taken to meet it: repeated measurements differ by as much."""
ROUNDING = 1e-5
"""Of an output's largest value."""
ALLOWED_GAP = 2.0
"""Steps by which an optimised kernel may differ from the plain meaning of its nodes: rounding, twice."""


def verify(
    prepared: Prepared,
    quantized: Model,
    plan: QuantPlan,
    held_out: Dataset,
    macs: Mapping[str, int],
    *,
    threads: int = 1,
    placed: Placed | None = None,
    formed: Formed | None = None,
    seed: int = 0,
    log: Log,
) -> Verdict:
    """Judge `quantized` against the float file it came from.

    Args:
        prepared: The float side.
        quantized: The emitted model.
        plan: What was meant to run in integers.
        held_out: Rows that calibration did not see.
        macs: Multiply-accumulates per row by node name.
        threads: Intra-op threads to measure the latency ratio with; 0 does not measure it.
        placed: What measured placement changed.
        formed: What was gained by other forms of products.
        seed: Of the bootstrap.
        log: Progress.
    """
    log.stage("Verifying")
    target = TARGETS[plan.target]
    config = _config(target)
    with tempfile.TemporaryDirectory(prefix="onnxq-") as scratch:
        path = Path(scratch) / "quantized.onnx"
        graph.save(quantized, path)
        candidate = Session(path, config)
        fidelity = bench.compare(Session(prepared.path), candidate, _first(held_out, COMPARED_ROWS))
        fixed = not has_free_rows(candidate)
        gap, coverage = math.nan, _planned(plan, macs)
        if target.on_cpu:
            gap = kernel_gap(quantized, probe_of(held_out, fixed))
            coverage = bench.coverage(path, macs, reasons=plan.skipped)
        notes = tuple(_notes(target, config))
        timed = threads and not any(note.startswith(UNTIMED) for note in notes)
        how = (target.provider, threads, seed)
        latency = _latency(prepared.path, path, held_out, how, fixed, log) if timed else ()
        size = graph.disk_bytes(path)
    return Verdict(
        fidelity=fidelity,
        coverage=coverage,
        float_bytes=graph.disk_bytes(prepared.path),
        quantized_bytes=size,
        latency=latency,
        optimized_gap=gap,
        warnings=tuple(_warnings(plan, coverage, latency, gap, prepared.path, size, placed)),
        placed=placed,
        formed=formed,
        notes=notes,
    )


def _config(target: Target) -> SessionConfig:
    """How to run a file for `target` here: on its provider, or as written where that is not here."""
    if target.on_cpu:
        return SessionConfig()
    if target.provider in available_providers():
        return SessionConfig(target.provider)
    return SessionConfig(simulate=True)


def _notes(target: Target, config: SessionConfig) -> Iterator[str]:
    """What was not measured."""
    if config.simulate:
        yield f"{UNTIMED}: the provider {PROVIDERS[target.provider]} is not here"
        yield "accuracy was measured on the CPU, with every node as it is written; integer coverage is what is planned"
    elif target.untimed:
        yield f"{UNTIMED}: {target.untimed}"


def _planned(plan: QuantPlan, macs: Mapping[str, int]) -> Coverage:
    """What is meant to run in integers."""
    inside = {name: count for name, count in macs.items() if name in plan.weights or name in plan.integer}
    half = "it computes in float16"
    floats = [
        FloatNode(name, "", half if name in plan.half else plan.skipped.get(name, ""), count)
        for name, count in macs.items()
        if name not in inside
    ]
    heavy = tuple(sorted(floats, key=lambda node: -node.macs))
    return Coverage(sum(inside.values()), sum(macs.values()), {}, heavy, planned=True)


def _first(rows: Dataset, count: int) -> Iterator[Feeds]:
    taken = 0
    for feeds in rows:
        yield feeds
        taken += count_rows(feeds)
        if taken >= count:
            return


def kernel_gap(quantized: Model, feeds: Feeds) -> float:
    """Largest difference between the runtime's optimised kernels and the QDQ graph's plain meaning, in steps.

    The graph is cut open at every tensor with a fixed grid, and every piece gets the codes of plain execution, so
    that rounding differences of one kernel do not add up in those behind it. A step is one code of a quantized tensor,
    or 1/255 of the range of a float output.
    """
    cut, entries = graph.cut_at_codes(quantized)
    plain = Session(graph.with_outputs(quantized, list(entries)), SessionConfig(optimize="off")).run(feeds)
    fused = Session(cut).run(feeds | {entry: plain[name] for name, entry in entries.items()})
    gaps = [np.abs(plain[name].astype(np.int32) - fused[name]).max(initial=0) for name in entries]
    floats = {name: value for name, value in plain.items() if name not in entries and not _rounded(value, fused[name])}
    return max(float(max(gaps, default=0)), bench.gap_in_steps(floats, fused))


def _rounded(a: Array, b: Array) -> bool:
    """Whether two outputs differ by no more than the rounding of float32 sums."""
    if a.dtype.kind != "f" or not np.isfinite(a).all():
        return False
    return bool(np.allclose(a, b, rtol=0, atol=ROUNDING * np.abs(a).max(initial=0)))


def _latency(
    float_path: Path, path: Path, rows: Dataset, how: tuple[str, int, int], fixed: bool, log: Log
) -> tuple[Latency, ...]:
    """Both files timed in turns; `how` is the provider, the threads and the seed."""
    log.stage("Measuring latency")
    feeds = next(iter(rows))
    one = feeds if fixed else {name: value[:1] for name, value in feeds.items()}
    provider, threads, seed = how
    return bench.measure(
        [float_path, path],
        providers=(provider,),
        threads=(threads,),
        feeds=one,
        seconds=0.2,
        min_rounds=7,
        seed=seed,
    )


def too_slow(settings: Recipe, verdict: Verdict | None) -> str:
    """Why the measured latency is not what was asked for; "" where it is, or was not measured."""
    limit = settings.wishes.max_latency
    if limit is None or verdict is None or len(verdict.latency) < 2:
        return ""
    plain, quick = verdict.latency
    if quick.median_ms <= limit.of(plain.median_ms) * SLACK:
        return ""
    ratio = quick.median_ms / plain.median_ms
    return f"the latency {settings.max_latency} is not met: {quick.median_ms:.3f} ms, {ratio:.2f}x, was measured."


def too_large(settings: Recipe, source: Path, quantized: Model) -> str:
    """Why the file is larger than asked for; "" where it is not."""
    limit = settings.wishes.max_size
    if limit is None:
        return ""
    most, found = limit.of(graph.disk_bytes(source)), written_bytes(quantized)
    return "" if found <= most else f"the size {settings.max_size} is not met: the file has {found} bytes."


def _warnings(
    plan: QuantPlan,
    coverage: Coverage,
    latency: tuple[Latency, ...],
    gap: float,
    source: Path,
    size: int,
    placed: Placed | None,
) -> Iterable[str]:
    missed = [node for node in coverage.floats if node.name in plan.weights]
    if missed and not plan.simulated and not coverage.planned:
        names = ", ".join(node.name for node in missed[:3])
        yield f"{len(missed)} layers meant for integers run in float: {names}. Please report this."
    if gap > ALLOWED_GAP:
        yield (
            f"an integer kernel differs from the plain meaning of its nodes by {gap:.1f} steps; "
            f"up to {ALLOWED_GAP:.0f} are rounding. Please report this, with the model."
        )
    if size >= graph.disk_bytes(source):
        yield f"the quantized file is not smaller than {source.name}."
    if len(latency) > 1 and "SLOWER" in latency[1].words:
        yield f"on this machine the quantized model is no gain in speed: {latency[1].words}."
        if placed is not None:
            yield f"no placement of integers that was timed beats float: {source.name} is the fastest file here."
    if plan.simulated and TARGETS[plan.target].on_cpu:
        yield "activations of other than 8 bits are simulated: exact, but in float kernels and without a speed gain."
