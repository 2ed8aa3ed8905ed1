"""Weight-only quantization: blocks of 4 or 8 bits, rounded with what the layers read on the calibration rows."""

from __future__ import annotations

import numpy as np

from onnxq import bench, calibrate, graph
from onnxq.emit.nbits import along, block_steps
from onnxq.errors import UnsupportedError, UsageError
from onnxq.graph import Layer, Model
from onnxq.pipeline.overriding import kept_names
from onnxq.pipeline.planning import some_rows
from onnxq.pipeline.targets import layer_bits
from onnxq.pipeline.tuning import Judge, Outcome
from onnxq.plan.weight_only import weight_only_plan
from onnxq.recipe import Recipe
from onnxq.tune.feedback import round_with_feedback
from onnxq.types import Dataset, LearnedLayer, Log, Observations, QuantPlan, Tuned
from onnxq.types.target import target_of

ROWS = 256
"""Calibration rows whose second moments guide rounding."""
BITS = (4, 8)


def require_weight_only(settings: Recipe) -> None:
    """Refuse what does not go with weights alone.

    Raises:
        UsageError: Names the option.
    """
    if not settings.weight_only:
        return
    target = target_of(settings.target)
    if not target.nbits or target.placing == "half":
        raise UsageError(f"--weight-only is for --target cpu and web, not {target.name}.")
    for option, bits in (("weight-bits", settings.weight_bits), ("first-last", settings.first_last)):
        if bits not in BITS:
            raise UsageError(f"--weight-only stores weights of 4 or 8 bits: --{option} {bits} is neither.")
    if settings.activation_bits != 8 or settings.attention_bits:
        raise UsageError("--weight-only leaves activations in float: give no bits of activations or attention.")
    if settings.wishes or settings.reconstruction != "none" or settings.placement == "measured":
        raise UsageError("--weight-only goes neither with budgets nor with learning nor with measured placement.")
    if settings.codebook_bits:
        raise UsageError("--weight-only rounds to even steps per block: leave --codebook-bits out.")
    if any(layer.has_bits for layer in settings.layers):
        raise UsageError("--weight-only has one number of bits: [[layers]] can keep layers in float, no more.")


def planned_weight_only(model: Model, rows: Dataset, settings: Recipe, log: Log) -> tuple[QuantPlan, Observations]:
    """The plan, and the shapes that verification needs.

    Raises:
        UnsupportedError: There is no product of MatMul with a constant matrix.
    """
    log.stage("Calibrating")
    bits = layer_bits(model, settings)
    plan = weight_only_plan(model, bits, target_of(settings.target), keep_float=kept_names(model, settings))
    if not plan.blocks:
        raise UnsupportedError(
            "--weight-only finds no MatMul with a constant matrix of 32 inputs or more: leave it out for int8."
        )
    few = some_rows(rows, 1, model)
    return plan, calibrate.observe(model, few, (), bench.matrix_tensors(model), seed=settings.seed)  # type: ignore[arg-type]


def guided_rounding(model: Model, tuned: Tuned, rows: Dataset, log: Log) -> Outcome:
    """Codes of blocks of 4 bits that make the products most exact, if the outputs gain; all else stays as it is."""
    plan = tuned.plan
    nodes = graph.node_names(model)
    readers: dict[str, list[Layer]] = {}
    widths: dict[str, int] = {}
    for name, grid in plan.blocks.items():
        layer = graph.layer_of(nodes[name])
        if grid.bits == 4 and not isinstance(layer, str):
            readers.setdefault(graph.name_of(layer.data), []).append(layer)
            widths[graph.name_of(layer.data)] = len(layer.weight)
    if not readers:
        return Outcome(tuned)
    log.stage("Rounding weights")
    count = sum(map(len, readers.values()))
    codes: dict[str, LearnedLayer] = {}
    for part in calibrate.grams(model, some_rows(rows, ROWS, model), widths):
        for tensor, gram in part.items():
            if not np.isfinite(gram).all():
                continue  # infinities inside the network: nothing to learn from
            for layer in readers[tensor]:
                grid = plan.blocks[str(layer.node.name)]
                steps = along(block_steps(layer.weight, grid.bits, grid.block, signed=True), grid.block, len(gram))
                found = round_with_feedback(layer.weight, steps, gram, grid.bits)
                codes[str(layer.node.name)] = LearnedLayer(found)
                log.step(f"{len(codes)} of {count} layers")
    judge = Judge(model, rows)
    said = "weights stay rounded to the nearest: rounding with feedback does not help this model"
    guided = Tuned(plan, {**tuned.layers, **codes})
    return Outcome(judge.better("rounding with feedback", tuned, guided, said, log), (), tuple(judge.steps))
