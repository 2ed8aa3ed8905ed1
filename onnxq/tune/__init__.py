"""Tuning: better codes, steps and biases than plain rounding gives, block after block."""

from onnxq.tune.cache import BUDGET_BYTES
from onnxq.tune.job import DecisionSums, ErrorSums, Job, Method, block_error
from onnxq.tune.moments import TuneMoments
from onnxq.tune.walk import batches_of, halves, walk

__all__ = [
    "BUDGET_BYTES",
    "DecisionSums",
    "ErrorSums",
    "Job",
    "Method",
    "TuneMoments",
    "batches_of",
    "block_error",
    "halves",
    "walk",
]
