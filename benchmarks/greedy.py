"""Bits by the greedy method, for comparison with the integer program: same sensitivities, same sizes, moments tuned.

    greedy.py MODEL.onnx --data FEEDS -o OUT.onnx --max-size BYTES [--samples 512]

The simplest method there is: from 8 bits, again and again the step that costs least error per byte saved.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from onnxq import calibrate, graph
from onnxq.emit import emit
from onnxq.pipeline.allocate import OPTIONS, errors_of, sizes
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

OVERHEAD = 0.01
"""Share of the size that nodes and tables for unpacking may take."""


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
    budget = Budget(sizes(found, known), args.max_size * (1 - OVERHEAD))
    plan = found.plan(found.by_layer(greedy(errors_of(known), budget).bits))
    tuned = tune_moments(model, Tuned(plan), rows, settings.seed, log)
    graph.save(emit(model, tuned.plan, learned=tuned.layers, packed=True), args.output)


if __name__ == "__main__":
    main()
