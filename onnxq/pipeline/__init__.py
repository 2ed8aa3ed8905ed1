"""The story: from a float file to a verified quantized one."""

from onnxq.pipeline.contents import inspect
from onnxq.pipeline.prepare import Prepared, prepare
from onnxq.pipeline.rewrite import reparam, simplify
from onnxq.pipeline.run import QuantizedModel, quantize
from onnxq.pipeline.score import evaluate

__all__ = [
    "Prepared",
    "QuantizedModel",
    "evaluate",
    "inspect",
    "prepare",
    "quantize",
    "reparam",
    "simplify",
]
