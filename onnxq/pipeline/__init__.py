"""The story: from a float file to a verified quantized one."""

from onnxq.pipeline.evaluate import evaluate
from onnxq.pipeline.inspect import inspect
from onnxq.pipeline.prepare import Prepared, prepare
from onnxq.pipeline.quantize import QuantizedModel, quantize, simplify

__all__ = [
    "Prepared",
    "QuantizedModel",
    "evaluate",
    "inspect",
    "prepare",
    "quantize",
    "simplify",
]
