"""What a recipe may ask of a target, and what is learned about the model for one."""

from __future__ import annotations

from onnxq import bench, calibrate, graph
from onnxq.calibrate import Extremes
from onnxq.errors import UsageError
from onnxq.graph import Model
from onnxq.pipeline.overriding import kept_names
from onnxq.pipeline.planning import some_rows
from onnxq.plan.half import block_layers, half_plan
from onnxq.recipe import Recipe
from onnxq.types import BlockGrid, Dataset, Log, Observations, QuantPlan
from onnxq.types.target import target_of

RANGE_ROWS = 64
"""Rows on which the extremes of all tensors are looked for."""
BITS = 4
"""Of weights in blocks."""


def require_target(settings: Recipe) -> None:
    """Refuse what the target has no kernels for and cannot emulate.

    Raises:
        UsageError: Names the option and what the target takes.
    """
    target = target_of(settings.target)
    asked = {
        "activation-bits": (settings.activation_bits, target.activation_bits),
        "residual-bits": (settings.residual_bits, target.activation_bits),
        "attention": (settings.attention_bits or 8, target.activation_bits),
        "weight-bits": (settings.weight_bits, target.weight_bits),
        "first-last": (settings.first_last, target.weight_bits),
    }
    for option, (bits, takes) in asked.items():
        if bits not in takes:
            known = ", ".join(map(str, takes))
            raise UsageError(f"--{option} {bits} is nothing that --target {target.name} has; it takes {known}.")
    if settings.codebook_bits and not target.packed:
        raise UsageError(f"--codebook-bits saves nothing for --target {target.name}, which reads whole codes.")
    if settings.wishes and not target.packed:
        raise UsageError(
            f"budgets are measured on the CPU, not for --target {target.name}: choose bits for cpu, keep the plan with "
            "--save-plan, and run onnxq emit on it."
        )
    if target.placing == "half" and (settings.reconstruction != "none" or settings.attention_bits):
        raise UsageError(f"--target {target.name} computes in float16: there are no integer codes to learn.")


def blocks_of(model: Model, settings: Recipe) -> dict[str, BlockGrid]:
    """Layers whose weights the target stores in blocks of 4 bits."""
    few = [name for name, bits in layer_bits(model, settings).items() if bits == BITS]
    return block_layers(model, target_of(settings.target), few)


def layer_bits(model: Model, settings: Recipe) -> dict[str, int]:
    """Weight bits of every layer by name, as the recipe has them for the first and last one and for the others."""
    names = [str(node.name) for node in graph.nodes(model, *graph.LAYER_OPS)]
    ends = {names[0], names[-1]} if names else set()
    return {name: settings.first_last if name in ends else settings.weight_bits for name in names}


def ranges_of(model: Model, rows: Dataset) -> Extremes:
    """Extremes of all float tensors, on the first rows."""
    return calibrate.extremes(model, some_rows(rows, RANGE_ROWS, model))


def planned_half(model: Model, rows: Dataset, settings: Recipe, log: Log) -> tuple[QuantPlan, Observations]:
    """The plan of a target that computes in float16, and the shapes that verification needs."""
    log.stage("Calibrating")
    few = some_rows(rows, RANGE_ROWS, model)
    plan = half_plan(
        model,
        calibrate.extremes(model, few),
        target_of(settings.target),
        keep_float=kept_names(model, settings),
        blocks=blocks_of(model, settings),
    )
    shapes = calibrate.observe(model, few, (), bench.matrix_tensors(model), seed=settings.seed)  # type: ignore[arg-type]
    return plan, shapes
