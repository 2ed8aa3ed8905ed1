"""The story: from a float file to a verified quantized one."""

from onnxq.pipeline.checkpoint import forget_progress
from onnxq.pipeline.contents import inspect
from onnxq.pipeline.prepare import Prepared, prepare
from onnxq.pipeline.result import Checks, QuantizedModel
from onnxq.pipeline.rewrite import reparam, simplify
from onnxq.pipeline.run import quantize
from onnxq.pipeline.score import evaluate
from onnxq.pipeline.tuning import Workplace

__all__ = [
    "Checks",
    "Prepared",
    "QuantizedModel",
    "Workplace",
    "evaluate",
    "forget_progress",
    "inspect",
    "prepare",
    "quantize",
    "reparam",
    "simplify",
]
