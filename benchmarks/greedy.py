"""Bits by the greedy method, for comparison with the integer program: same sensitivities, same sizes, moments tuned.

    greedy.py MODEL.onnx --data FEEDS -o OUT.onnx --max-size BYTES [--samples 512]

The simplest method there is: from 8 bits, again and again the step that costs least error per byte saved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from onnxq import calibrate, graph
from onnxq.emit import emit
from onnxq.pipeline.allocate import OPTIONS, errors_of, sizes, written_bytes
from onnxq.pipeline.budgeting import BATCH, ROWS, calibrated
from onnxq.pipeline.planning import observe
from onnxq.pipeline.prepare import load_float, model_inputs, prepare, probe_of, rows_are_free
from onnxq.pipeline.sensitivity import sensitivities
from onnxq.pipeline.tuning import tune_moments
from onnxq.plan.program import greedy
from onnxq.recipe import Recipe
from onnxq.tune import batches_of
from onnxq.types import Silence, Tuned
from onnxq.types.mixed import BASE, Budget

ATTEMPTS = 4
"""Nodes and tables for unpacking are foreseen only in part; so often the limit is corrected by what was not."""


def main() -> None:
    """Quantize one model."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--max-size", type=float, required=True)
    parser.add_argument("--samples", type=int, default=512)
    args = parser.parse_args()
    settings, log = Recipe(samples=args.samples), Silence()
    loaded = load_float(args.model)
    dataset = calibrate.open_data(str(args.data), model_inputs(loaded), samples=args.samples)
    rows, _ = calibrate.split(dataset)
    model = prepare(args.model, loaded, lambda: probe_of(dataset, False)).model
    placement, observations = observe(model, rows, settings, log)
    found = calibrated(model, placement, observations, rows, settings, [BASE[1]], log)
    batches = list(batches_of(rows, BATCH, free=rows_are_free(model), limit=ROWS))
    known = sensitivities(found, OPTIONS, batches)
    limit, best = args.max_size, None
    for _ in range(ATTEMPTS):
        chosen = greedy(errors_of(known), Budget(sizes(found, known), limit))
        plan = found.plan(found.by_layer(chosen.bits))
        size = written_bytes(emit(model, plan, packed=True))
        if size <= args.max_size and (best is None or size > best[0]):
            best = size, plan
        limit = args.max_size - (size - chosen.costs["size"])
    assert best is not None, f"no file of {args.max_size} bytes"
    plan = best[1]
    tuned = tune_moments(model, Tuned(plan), rows, settings.seed, log)
    graph.save(emit(model, tuned.plan, learned=tuned.layers, packed=True), args.output)


if __name__ == "__main__":
    main()
