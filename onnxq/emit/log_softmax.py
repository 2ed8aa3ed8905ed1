"""Attention probabilities on a logarithmic grid, in operators that every runtime has.

    Softmax(x)  ->  ThresholdedRelu(Exp(DequantizeLinear(QuantizeLinear(LogSoftmax(x)))))

With the step ln 2 / p and the zero point last = 2^bits - 1, QuantizeLinear does the rounding and clipping of

    code = clip(rint(p log2(A)) + last, 0, last)

and Exp gives 2^((code - last) / p) back. The lowest code stands for zero: ThresholdedRelu lets pass what is above the
geometric mean of the two lowest levels. The codes are uint8; the operators run in float (docs/transformers.md).
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from onnxq import graph
from onnxq.errors import UnsupportedError
from onnxq.graph import Model, Node, Value
from onnxq.types import LogGrid


def emit_log_softmax(model: Model, node: Node, grid: LogGrid, inside: Collection[Node]) -> None:
    """Let the readers of a Softmax read its result from a logarithmic grid.

    Args:
        model: Edited in place.
        node: A Softmax of the main graph.
        grid: The grid.
        inside: Those of its readers that read the grid; others keep the float result.

    Raises:
        UnsupportedError: The node is no Softmax.
    """
    if node.op_type != "Softmax" or node.domain not in ("", "ai.onnx"):
        raise UnsupportedError(f"the plan gives {node.name!r} a logarithmic grid, but it is no Softmax.")
    name, last = str(node.name), 2**grid.bits - 1
    axis = graph.attribute(node, "axis", None)
    scale = graph.add_constant(model, f"{name}_log_scale", np.asarray(np.log(2.0) / grid.per_octave, np.float32))
    zero = graph.add_constant(model, f"{name}_log_zero_point", np.asarray(last, np.uint8))

    def behind(op_type: str, inputs: list[Value | None], suffix: str, **attributes: float) -> Value:
        return graph.add_node(model, op_type, inputs, f"{name}_{suffix}", before=node, attributes=attributes)

    logs = behind("LogSoftmax", [node.inputs[0]], "log", **({} if axis is None else {"axis": axis}))
    codes = behind("QuantizeLinear", [logs, scale, zero], "log_q")
    powers = behind("Exp", [behind("DequantizeLinear", [codes, scale, zero], "log_dq")], "exp")
    least = 2.0 ** (-(last - 0.5) / grid.per_octave)
    result = behind("ThresholdedRelu", [powers], "levels", alpha=least)
    result.type, result.shape = node.outputs[0].type, node.outputs[0].shape
    graph.redirect(node.outputs[0], result, lambda reader: reader in inside)
