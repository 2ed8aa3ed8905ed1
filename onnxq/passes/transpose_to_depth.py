"""A transposed convolution becomes a convolution that computes all its phases, and a rearrangement of them.

With stride s and padding p in front, per axis, tap t of the kernel carries x[m] to y[s m + t - p]. Written for the
phase r of output position s m + r, it reads at the offset d from m:

    r = (t - p) mod s,   d = -((t - p) div s),   y[o, s m + r] = b[o] + sum_c sum_t W[c, o, t] x[c, m + d]

over the taps t of that phase. Where the output is exactly s times as large as the input, m runs over the positions of
x, and all phases of all outputs are one convolution

    Y[o s s + r1 s + r2, m] = b[o] + sum_c sum_d K[o s s + r1 s + r2, c, d - first] x[c, m + d]

with K[o s s + r1 s + r2, c, d - first] = W[c, o, t] and zeros where no tap falls, padded by -first in front and by last
behind for offsets first..last; then y = DepthToSpace(Y, blocksize = s, mode = "CRD"). A kernel as large as its stride
gives one offset and no zeros. A Relu or Clip behind the node moves in front of the rearrangement, where the
convolution's integer kernel absorbs it: it works element by element, so the order does not matter.

The runtime has an integer kernel for Conv and none for ConvTranspose. (Sub-pixel convolution: Shi et al., "Is the
deconvolution layer the same as a convolutional layer?", 2016, arXiv:1609.07009.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Layer, Model, Node, Value
from onnxq.passes.base import Pass

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class _Geometry:
    """Stride of both axes, and per axis the padding in front and the range of input offsets that taps reach."""

    stride: int
    pads: tuple[int, ...]
    first: tuple[int, ...]
    last: tuple[int, ...]

    @property
    def taps(self) -> tuple[int, ...]:
        """Kernel size of the convolution."""
        return tuple(last - first + 1 for first, last in zip(self.first, self.last, strict=True))


@dataclass(frozen=True)
class TransposeToDepth(Pass):
    """Rewrite ConvTranspose nodes that multiply both spatial sizes by their stride.

    Attributes:
        growth: Most multiplications of the convolution per multiplication of the transposed one; integer kernels
            make up for the default, which is that of kernel 4, stride 2, padding 1.
    """

    growth: float = 2.25

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of nodes rewritten."""
        done = 0
        for node in list(graph.nodes(model, "ConvTranspose")):
            layer = graph.layer_of(node)
            geometry = self._geometry(node, layer)
            if not isinstance(layer, str) and not isinstance(geometry, str):
                _rewrite(model, layer, geometry)
                done += 1
        return done

    def refused(self, model: Model) -> Mapping[str, str]:
        """Nodes that stay: node name -> reason."""
        found = {
            str(node.name): self._geometry(node, graph.layer_of(node)) for node in graph.nodes(model, "ConvTranspose")
        }
        return {name: reason for name, reason in found.items() if isinstance(reason, str)}

    def _geometry(self, node: Node, layer: Layer | str) -> _Geometry | str:
        if isinstance(layer, str):
            return layer
        if layer.weight.ndim != 4:
            return "it does not work over two axes"
        if graph.attribute(node, "group", 1) != 1:
            return "it has groups"
        if any(step != 1 for step in graph.attribute(node, "dilations", [1, 1])):
            return "it has dilations"
        if graph.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID") or "output_shape" in node.attributes:
            return "its padding is automatic"
        strides = graph.attribute(node, "strides", [1, 1])
        if strides[0] != strides[1] or strides[0] == 1:
            return f"its strides are {strides[0]} and {strides[1]}"
        found = _taps(node, layer, strides[0])
        if isinstance(found, str):
            return found
        growth = float(np.prod(found.taps)) * strides[0] ** 2 / float(np.prod(layer.weight.shape[2:]))
        if growth > self.growth:
            return f"the convolution would multiply {growth:.2g} times as often"
        return found


def _taps(node: Node, layer: Layer, stride: int) -> _Geometry | str:
    """Where the phases' taps lie, or why the output is not `stride` times the input."""
    kernel = layer.weight.shape[2:]
    pads = graph.attribute(node, "pads", [0, 0, 0, 0])
    extra = graph.attribute(node, "output_padding", [0, 0])
    first, last = [], []
    for axis in range(2):
        if kernel[axis] - pads[axis] - pads[axis + 2] + extra[axis] != stride:
            return "its output is not its input's size times its stride"
        offsets = [-((tap - pads[axis]) // stride) for tap in range(kernel[axis])]
        first.append(min(0, *offsets))
        last.append(max(0, *offsets))
    return _Geometry(stride, tuple(pads[:2]), tuple(first), tuple(last))


def _kernel(weight: Floats, geometry: _Geometry) -> Floats:
    """[inputs, outputs, *kernel] -> [outputs * stride^2, inputs, *taps]."""
    stride, pads, first = geometry.stride, geometry.pads, geometry.first
    inputs, outputs = weight.shape[:2]
    wide = np.zeros((outputs, stride, stride, inputs, *geometry.taps), np.float32)
    for row, column in np.ndindex(*weight.shape[2:]):
        down, right = (row - pads[0]) // stride, (column - pads[1]) // stride
        phase = (row - pads[0]) % stride, (column - pads[1]) % stride
        wide[:, *phase, :, -down - first[0], -right - first[1]] = weight[:, :, row, column].T
    return wide.reshape(-1, inputs, *geometry.taps)


def _rewrite(model: Model, layer: Layer, geometry: _Geometry) -> None:
    node, name = layer.node, str(layer.node.name)
    attributes = {
        "kernel_shape": list(geometry.taps),
        "pads": [*(-offset for offset in geometry.first), *geometry.last],
    }
    inputs: list[Value | None] = [
        layer.data,
        graph.add_constant(model, f"{name}.weight", _kernel(layer.weight, geometry)),
    ]
    if layer.bias is not None:
        repeated = np.repeat(layer.bias, geometry.stride**2)
        inputs.append(graph.add_constant(model, f"{name}.bias", repeated))
    phases = graph.add_node(model, "Conv", inputs, f"{name}_phases", before=node, attributes=attributes)
    _shaped(phases, layer, geometry)
    activation = graph.activation_after(node.outputs[0])
    last = node if activation is None else activation.node
    if activation is not None:
        bounds = list(activation.node.inputs)[1:]
        kind = activation.node.op_type
        active = graph.add_node(model, kind, [phases, *bounds], f"{activation.node.name}_phases", before=node)
        _shaped(active, layer, geometry)
        phases = active
    how: dict[str, int | str] = {"blocksize": geometry.stride, "mode": "CRD"}
    new = graph.add_node(model, "DepthToSpace", [phases], f"{name}_space", before=last, attributes=how)
    old = last.outputs[0]
    new.shape, new.type = old.shape, old.type
    graph.redirect(old, new)
    if old.is_graph_output():
        graph.move_name(old, new, model)
    for part in dict.fromkeys((last, node)):
        model.graph.remove(part, safe=True)


def _shaped(value: Value, layer: Layer, geometry: _Geometry) -> None:
    """Record type and shape of the phases, as far as those of the input are known."""
    shape = layer.data.shape
    value.type = layer.output.type
    if shape is not None:
        value.shape = type(shape)([shape[0], layer.channels * geometry.stride**2, *shape[2:]])
