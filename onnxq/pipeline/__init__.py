"""The story: from a float file to a verified quantized one."""

from onnxq.pipeline.contents import inspect
from onnxq.pipeline.prepare import Prepared, prepare
from onnxq.pipeline.run import QuantizedModel, quantize, simplify
from onnxq.pipeline.score import evaluate

__all__ = [
    "Prepared",
    "QuantizedModel",
    "evaluate",
    "inspect",
    "prepare",
    "quantize",
    "simplify",
]
