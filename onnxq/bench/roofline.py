"""How near a model comes to what the machine can do.

    least time = max( integer MACs / int8 peak + float MACs / float peak ,  bytes / rate at which weights arrive )

The multiply-accumulates (MACs) are those of Conv, Gemm and MatMul in one call, integer or float as the runtime's
optimised graph executes them; the bytes are its constants, the inputs and the outputs, which have to pass at least
once. The least time over the measured median is the share of the machine that the model uses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from onnxq import graph
from onnxq.bench.coverage import coverage
from onnxq.bench.inputs import make_feeds, merge_specs
from onnxq.bench.latency import FIRST_RUN_SECONDS
from onnxq.bench.macs import float_macs, matrix_tensors
from onnxq.bench.peaks import peak
from onnxq.errors import OnnxqError
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Feeds, Latency, Peak, Roof, Work

_PLAIN = SessionConfig(threads=1, optimize="basic")


def work_of(path: Path, feeds: Feeds) -> Work:
    """Multiply-accumulates and bytes of one call.

    Raises:
        OnnxqError: The model cannot be run on these feeds.
    """
    model = graph.load(path)
    wanted = matrix_tensors(model)
    outputs = [graph.name_of(value) for value in model.graph.outputs]
    session = Session(graph.with_outputs(model, wanted), _PLAIN)
    seen = session.run(feeds, limit_s=FIRST_RUN_SECONDS)
    macs = float_macs(model, {name: array.shape for name, array in {**seen, **feeds}.items()}, 1)
    found = coverage(model, macs)
    moved = sum(array.nbytes for array in (*feeds.values(), *(seen[name] for name in outputs)))
    return Work(found.integer_macs, found.total_macs - found.integer_macs, found.constant_bytes + moved)


def roofs(
    models: Sequence[Path],
    latencies: Sequence[Latency],
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    feeds: Feeds | None = None,
    seed: int = 0,
) -> tuple[Roof | None, ...]:
    """For every latency how near it is to the least time; None where that is not known.

    It is known for the CPU provider, and for models that can be run with the tensors in question as outputs.

    Args:
        models: The files.
        latencies: As `measure` returned them for these files.
        shapes: As given to `measure`.
        feeds: As given to `measure`.
        seed: As given to `measure`.
    """
    specs = merge_specs({str(path): Session(path, replace(_PLAIN, optimize="off")).inputs for path in models})
    works: dict[tuple[str, int], Work | None] = {}
    peaks: dict[int, Peak] = {}
    found: list[Roof | None] = []
    for entry in latencies:
        if entry.provider != "cpu":
            found.append(None)
            continue
        key = (entry.model, entry.batch)
        if key not in works:
            rows = make_feeds(specs, entry.batch, shapes=shapes, feeds=feeds, seed=seed)
            works[key] = _work(Path(entry.model), rows)
        work = works[key]
        if work is None:
            found.append(None)
            continue
        if entry.threads not in peaks:
            peaks[entry.threads] = peak(entry.threads)
        roof = Roof(work, peaks[entry.threads], min(entry.samples_ms))
        if roof.share > 1:  # the peak was taken under load
            peaks[entry.threads] = peak(entry.threads, fresh=True)
        found.append(roof)
    return tuple(_with_peak(roof, peaks) for roof in found)


def _work(path: Path, feeds: Feeds) -> Work | None:
    try:
        return work_of(path, feeds)
    except OnnxqError:
        return None


def _with_peak(roof: Roof | None, peaks: Mapping[int, Peak]) -> Roof | None:
    return None if roof is None else replace(roof, peak=peaks[roof.peak.threads])
