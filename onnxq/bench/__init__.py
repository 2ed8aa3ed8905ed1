"""Measurements: latency side by side, what runs in integer kernels and how near the peak, how near the outputs are."""

from onnxq.bench.coverage import coverage, foreign_coverage, kernels
from onnxq.bench.fidelity import Score, compare, gap_in_steps, top1
from onnxq.bench.history import History, changes, read_history
from onnxq.bench.inputs import fixed_batch, make_feeds, parse_shapes
from onnxq.bench.latency import measure
from onnxq.bench.macs import float_macs, matrix_tensors
from onnxq.bench.peaks import peak, peak_file
from onnxq.bench.profile import Kernel, profiles
from onnxq.bench.roofline import roofs, work_of
from onnxq.bench.stats import change_interval, difference, mcnemar, paired, ratio_interval, wilson

__all__ = [
    "History",
    "Kernel",
    "Score",
    "change_interval",
    "changes",
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
    "peak",
    "peak_file",
    "profiles",
    "ratio_interval",
    "read_history",
    "roofs",
    "top1",
    "wilson",
    "work_of",
]
