"""Measurements: latency side by side, what runs in integer kernels, how near the outputs are."""

from onnxq.bench.coverage import coverage, foreign_coverage, kernels
from onnxq.bench.fidelity import Score, compare, gap_in_steps, top1
from onnxq.bench.inputs import fixed_batch, make_feeds, parse_shapes
from onnxq.bench.latency import measure
from onnxq.bench.macs import float_macs, matrix_tensors
from onnxq.bench.stats import difference, mcnemar, paired, ratio_interval, wilson

__all__ = [
    "Score",
    "compare",
    "coverage",
    "difference",
    "fixed_batch",
    "float_macs",
    "foreign_coverage",
    "gap_in_steps",
    "kernels",
    "make_feeds",
    "matrix_tensors",
    "mcnemar",
    "measure",
    "paired",
    "parse_shapes",
    "ratio_interval",
    "top1",
    "wilson",
]
