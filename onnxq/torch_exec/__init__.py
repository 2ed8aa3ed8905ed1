"""ONNX graph slices as differentiable torch modules.

A slice is any connected part of a graph, from one layer to the whole model. Each operator is one small function in
`onnxq.torch_exec.ops`; what those functions do not honour is refused when the slice is made, never ignored.
"""

from onnxq.torch_exec.check import check
from onnxq.torch_exec.extract import extract
from onnxq.torch_exec.ops import supported_ops
from onnxq.torch_exec.slice import Slice

__all__ = ["Slice", "check", "extract", "supported_ops"]
