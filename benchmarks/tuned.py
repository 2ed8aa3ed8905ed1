"""Quantize with learned methods whose every field is given; the command line has options for few of them.

    tuned.py '{"model": FILE, "data": DIR, "out": FILE, "recipe": {...}, "methods": [[NAME, {FIELD: ...}], ...]}'

Ranges and placement are those of the recipe; the methods then walk over the blocks one after the other, means and
spreads are tuned where the recipe says so (`bn_tuning`), and the file is written. Prints one JSON line: each method's
mean error of the blocks' outputs on the held rows, before and after.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any


def quantize(job: Mapping[str, Any]) -> dict[str, list[float]]:
    """Do one job; returns method -> mean error before and after."""
    from onnxq import calibrate, graph, pipeline
    from onnxq.emit import emit
    from onnxq.pipeline.prepare import model_inputs, rows_are_free
    from onnxq.pipeline.tuning import LEARN_BATCH, LEARN_ROWS, Judge, tune_moments
    from onnxq.plan import find_blocks
    from onnxq.tune import batches_of, walk
    from onnxq.types import BlockResult, Silence, Tuned

    recipe = dict(job["recipe"])
    moments, seed = recipe.pop("bn_tuning", False), recipe.get("seed", 0)
    base = pipeline.quantize(job["model"], job["data"], bn_tuning=False, checks=pipeline.Checks(verify=False), **recipe)
    model = base.prepared.model
    data = calibrate.open_data(job["data"], model_inputs(model), samples=base.recipe.samples)
    rows, _ = calibrate.split(data)
    shaped = model.clone()
    graph.infer_shapes(shaped)
    batches = list(batches_of(rows, LEARN_BATCH, free=rows_are_free(model), limit=LEARN_ROWS))
    methods = [_method(name, given) for name, given in job["methods"]]
    tuned = Tuned(base.plan)
    results: list[BlockResult] = []
    if methods:
        tuned, results = walk(model, tuned, find_blocks(shaped), methods, batches, seed=seed)
    if moments:
        found = tune_moments(model, tuned, rows, seed, Silence())
        tuned = Judge(model, rows).better("moments", tuned, found, "", Silence())
    graph.save(emit(model, tuned.plan, learned=tuned.layers, fused=True), job["out"])
    errors: dict[str, list[float]] = {}
    for method in dict.fromkeys(result.method for result in results):
        mine = [result for result in results if result.method == method]
        after = [result.after if result.kept else result.before for result in mine]
        errors[method] = [statistics.fmean(result.before for result in mine), statistics.fmean(after)]
    return errors


def _method(name: str, given: Mapping[str, Any]) -> Any:
    """A method by its name, with the given fields."""
    from onnxq.tune import TuneMoments
    from onnxq.tune.adaquant import AdaQuant
    from onnxq.tune.adaround import AdaRound
    from onnxq.tune.aquant import AQuant
    from onnxq.tune.repapq import RepAPQ

    kinds: Mapping[str, Any] = {"adaquant": AdaQuant, "adaround": AdaRound, "aquant": AQuant, "repapq": RepAPQ}
    kind = TuneMoments if name == "moments" else kinds[name]
    unknown = set(given) - {entry.name for entry in fields(kind)}
    assert not unknown, f"{name} has no field {', '.join(unknown)}"
    return kind(**given)


def main(argv: Sequence[str]) -> None:
    """Do the job on the command line."""
    print(json.dumps(quantize(json.loads(argv[0]))))


if __name__ == "__main__":
    main(sys.argv[1:])
