"""Small models written as ONNX text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from onnxq.graph.edit import tidy


def from_text(text: str, constants: Mapping[str, npt.NDArray[Any]], *, opset: int = 17) -> ir.Model:
    """The model of a graph in ONNX text, such as `g (float[n,4] x) => (float[n,2] y) { y = MatMul(x, w) }`.

    Args:
        text: One graph.
        constants: Its initializers.
        opset: Of the standard operators.
    """
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]> {text}')
    for name, array in constants.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(array), name))
    model = ir.from_proto(proto)
    tidy(model)
    return model
