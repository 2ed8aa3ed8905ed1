"""Results as JSON documents. Every document carries its schema version; units are in the key names."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from onnxq.types import Coverage, Evaluation, Inspection, Interval, Latency, Summary, Verdict

SCHEMA = 1


def to_json(document: Mapping[str, Any]) -> str:
    """One JSON document; infinities and NaN, which JSON lacks, become null."""
    return json.dumps(_clean(document), indent=2, default=str)


def quantize_document(run: Summary) -> dict[str, Any]:
    """Everything that the terminal shows about a run, and the plan's grids."""
    return {
        "schema": SCHEMA,
        "kind": "quantize",
        "source": run.source,
        "output": run.output,
        "recipe": dict(run.recipe),
        "data": dict(run.data),
        "calibration_rows": run.rows,
        "verdict": None if run.verdict is None else _verdict(run.verdict),
        "evaluation": None if run.evaluation is None else _evaluation(run.evaluation),
        "layers": {
            name: {"weight_bits": grid.bits, "per_channel": grid.axis is not None, "codebook": bool(grid.values)}
            for name, grid in run.plan.weights.items()
        },
        "blocks": {name: asdict(grid) for name, grid in run.plan.blocks.items()},
        "tensors": {name: asdict(grid) for name, grid in run.plan.tensors.items()},
        "dynamic": list(run.plan.dynamic),
        "skipped": dict(run.plan.skipped),
        "learning": [asdict(result) for result in run.blocks],
        "tuning": [asdict(step) for step in run.steps],
        "seconds": run.seconds,
    }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    return {
        "sqnr_db": dict(verdict.fidelity.sqnr_db),
        "agreement": _interval(verdict.fidelity.agreement),
        "agreed": None if verdict.fidelity.agreed is None else asdict(verdict.fidelity.agreed),
        "held_out_rows": verdict.fidelity.rows,
        "float_bytes": verdict.float_bytes,
        "quantized_bytes": verdict.quantized_bytes,
        "size_ratio": verdict.quantized_bytes / max(verdict.float_bytes, 1),
        **_coverage(verdict.coverage),
        "latency": [_latency(latency) for latency in verdict.latency],
        "latency_ratio": _interval(verdict.latency[1].ratio) if len(verdict.latency) > 1 else None,
        "optimized_gap_steps": verdict.optimized_gap,
        "measured_placement": None if verdict.placed is None else asdict(verdict.placed),
        "measured_products": None if verdict.formed is None else asdict(verdict.formed),
        "warnings": list(verdict.warnings),
        "notes": list(verdict.notes),
    }


def _coverage(coverage: Coverage) -> dict[str, Any]:
    return {
        "integer_coverage": coverage.share,
        "integer_coverage_planned": coverage.planned,
        "integer_macs": coverage.integer_macs,
        "total_macs": coverage.total_macs,
        "kernels": dict(coverage.kernels),
        "float_nodes": [asdict(node) for node in coverage.floats],
    }


def _interval(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else asdict(interval)


def _latency(latency: Latency) -> dict[str, Any]:
    return asdict(latency)


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    return {**asdict(evaluation), "p_value": evaluation.paired.p_value if evaluation.paired is not None else None}


def evaluation_document(model: str, evaluation: Evaluation) -> dict[str, Any]:
    """The result of `evaluate`."""
    return {"schema": SCHEMA, "kind": "evaluate", "model": model, **_evaluation(evaluation)}


def inspection_document(found: Inspection) -> dict[str, Any]:
    """The result of `inspect`."""
    document = asdict(found)
    document["coverage"] = None if found.coverage is None else _coverage(found.coverage)
    document["layer_weights"] = {
        "elements": found.layer_weights,
        "bytes": found.layer_bytes,
        "average_bits": found.average_bits,
    }
    return {"schema": SCHEMA, "kind": "inspect", **document}


def _clean(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _clean(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(entry) for entry in value]
    return value
