"""A range rule, a rewrite and a tuner of one's own, used like those that onnxq brings along.

    python examples/own_parts.py MODEL.onnx DATA OUT.onnx

Each is a plain function; registering it gives it a name that recipes know. See docs/extending.md.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np

import onnxq
from onnxq import graph
from onnxq.grid import Grid
from onnxq.tune import Job, block_error
from onnxq.types import TensorStats, Tuned


def three_sigma(stats: TensorStats, grid: Grid) -> tuple[float, float]:
    """Three standard deviations around the mean, as far as values were seen there."""
    width = 2 * stats.limit / len(stats.counts)
    values = -stats.limit + width * (np.arange(len(stats.counts)) + 0.5)
    mean = float(np.average(values, weights=stats.counts))
    sigma = float(np.sqrt(np.average(np.square(values - mean), weights=stats.counts)))
    return max(stats.low, mean - 3 * sigma), min(stats.high, mean + 3 * sigma)


def divide_by_multiplying(model: graph.Model) -> int:
    """A division by a constant becomes a multiplication, for which the runtime has an integer kernel."""
    count = 0
    for node in list(graph.nodes(model, "Div")):
        divisor = graph.constant(node.inputs[1])
        if divisor is None or divisor.dtype != np.float32 or not divisor.all():
            continue
        factor = graph.add_constant(model, f"{node.name}_factor", (1 / divisor).astype(np.float32))
        product = graph.add_node(model, "Mul", [node.inputs[0], factor], f"{node.name}_mul", before=node)
        graph.redirect(node.outputs[0], product)
        if node.outputs[0].is_graph_output():
            graph.move_name(node.outputs[0], product, model)
        count += 1
    return count


def nudge_steps(job: Job, tuned: Tuned, *, iterations: int, device: str) -> Tuned:
    """Try other weight steps, layer after layer, and keep what brings the block's outputs nearer to the float's."""
    best, least = tuned, block_error(job, tuned, job.train)
    for name in job.block.layers:
        for factor in (0.85, 0.92, 1.08) if name in tuned.plan.weights else ():
            grid = tuned.plan.weights[name]
            narrower = replace(grid, scales=tuple(step * factor for step in grid.scales))
            trial = replace(best, plan=replace(best.plan, weights={**best.plan.weights, name: narrower}))
            error = block_error(job, trial, job.train)
            if error < least:
                best, least = trial, error
    return best


def register() -> None:
    """Give them names."""
    onnxq.register_range_rule("three-sigma", three_sigma)
    onnxq.register_pass("DivideByMultiplying", divide_by_multiplying)
    onnxq.register_tuner("nudge", nudge_steps)


if __name__ == "__main__":
    register()
    model, data, output = sys.argv[1:]
    result = onnxq.quantize(model, data, "w4a8", ranges="three-sigma", reconstruction="nudge")
    result.save(output)
    for step in result.steps:
        print(f"{step.name}: error {step.before:.3g} -> {step.after:.3g}, {'kept' if step.kept else 'dropped'}")
