"""Scaling the input and output channels of layers, whatever their layout.

Every weight is seen as a kernel [groups, outputs / groups, inputs / groups, taps] in float64. With per-channel factors

    inputs      K'[g, o, i, t] = K[g, o, i, t] * r[i of g]          reads  x / r
    outputs     K'[g, o, i, t] = K[g, o, i, t] * s[o of g], b' = b * s     gives  s * y
    shift       b'[o] = b[o] + sum over i, t of K[g, o, i, t] * c[i of g]   reads  x - c  (where nothing is padded)
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Layer, Model
from onnxq.passes.scaling import Edit, apply_edit

Kernel = npt.NDArray[np.float64]
Vector = npt.NDArray[np.float64]


def kernel_of(layer: Layer) -> Kernel:
    """The weight as [groups, outputs / groups, inputs / groups, taps]; taps is 1 for Gemm and MatMul."""
    weight = layer.weight.astype(np.float64)
    groups = graph.attribute(layer.node, "group", 1)
    if layer.node.op_type == "Conv":
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    if layer.node.op_type == "ConvTranspose":
        parts = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return np.ascontiguousarray(parts.transpose(0, 2, 1, 3))
    return (weight if layer.axis == 0 else weight.T)[None, :, :, None]


def weight_of(layer: Layer, kernel: Kernel) -> npt.NDArray[np.float32]:
    """`kernel` in the layout of the layer's weight, float32: the inverse of `kernel_of`."""
    if layer.node.op_type == "ConvTranspose":
        kernel = kernel.transpose(0, 2, 1, 3)
    elif layer.node.op_type != "Conv":
        kernel = kernel[0, :, :, 0] if layer.axis == 0 else kernel[0, :, :, 0].T
    return np.ascontiguousarray(kernel).reshape(layer.weight.shape).astype(np.float32)


def scale_inputs(kernel: Kernel, factors: Vector) -> Kernel:
    """Multiply what reads input channel c by factors[c]."""
    scaled: Kernel = kernel * factors.reshape(len(kernel), 1, -1, 1)
    return scaled


def scale_outputs(kernel: Kernel, factors: Vector) -> Kernel:
    """Multiply what makes output channel c by factors[c]."""
    scaled: Kernel = kernel * factors.reshape(len(kernel), -1, 1, 1)
    return scaled


def response(kernel: Kernel, values: Vector) -> Vector:
    """The output [outputs] where input channel c holds values[c] everywhere, without padding or bias."""
    total: Vector = scale_inputs(kernel, values).sum((2, 3)).reshape(-1)
    return total


def bias_of(layer: Layer, outputs: int) -> Vector:
    """The bias in float64, zeros where there is none."""
    return np.zeros(outputs) if layer.bias is None else layer.bias.astype(np.float64)


def takes_shift(layer: Layer) -> bool:
    """Whether a shift of the input is a shift of the output: every output sees every tap, and no padding."""
    node = layer.node
    if node.op_type != "Conv":
        return node.op_type != "ConvTranspose"
    pads: list[int] = graph.attribute(node, "pads", [])
    return not any(pads) and graph.attribute(node, "auto_pad", "NOTSET") in ("NOTSET", "VALID")


def write_layer(model: Model, layer: Layer, weight: npt.NDArray[np.float32], bias: Vector | None) -> None:
    """Give `layer` its new weight and, unless it is None, its new bias [outputs]; one is made where there was none."""
    apply_edit(model, Edit(layer, weight, None if bias is None else bias.astype(np.float32)))
