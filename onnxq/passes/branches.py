"""A linear branch: anything that is a convolution of one tensor, in one form.

    Conv                    K, b                                                      as stored
    BatchNormalization      K[o, 0] = gamma / sqrt(var + eps) at one tap, depthwise,  b = beta - mean * K
    a constant scale        K[o, 0] = scale at one tap, depthwise,                    b = the constant added
    AveragePool             K[o, 0] = 1 / taps, depthwise                             where padding counts as values
    the tensor itself       K[o, 0] = 1 at one tap, depthwise

A tap at index i of a kernel with padding p and dilation d reads the input at  o * stride + i * d - p  for output
position o. How branches are added and put one behind the other: see `branch_algebra`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Model, Node, Value
from onnxq.passes.affine import Axis, affine_of, norm_affine

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Branch:
    """A convolution of `source`.

    Attributes:
        source: The tensor it reads.
        nodes: The nodes it consists of, each in front of those it reads; none for the tensor itself.
        kernel: [outputs, inputs per group, *kernel], float64.
        bias: [outputs], float64.
        group: Number of groups.
        strides: Per spatial axis.
        dilations: Per spatial axis; 1 where the kernel has one tap.
        begins: Padding in front, per spatial axis.
        ends: Padding behind, per spatial axis.
        cost: Multiplications that `nodes` spend on one output position, all channels together.
    """

    source: Value
    nodes: tuple[Node, ...]
    kernel: Floats
    bias: Floats
    group: int
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    begins: tuple[int, ...]
    ends: tuple[int, ...]
    cost: int

    @property
    def taps(self) -> tuple[int, ...]:
        """Kernel size per spatial axis."""
        return self.kernel.shape[2:]

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return int(self.kernel.shape[1]) * self.group

    def shrink(self, axis: int) -> int:
        """How much larger the padded input is than the span of outputs: equal for branches of equal output size."""
        return self.begins[axis] + self.ends[axis] - (self.taps[axis] - 1) * self.dilations[axis]

    def sqnr_db(self) -> float:
        """Signal-to-noise ratio of the kernel on an 8-bit grid with one step per output channel, decibels."""
        rows = self.kernel.reshape(len(self.kernel), -1)
        steps = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-30) / 127
        error = rows - np.rint(rows / steps) * steps
        return float(10 * np.log10(max((rows**2).sum(), 1e-30) / max((error**2).sum(), 1e-30)))


def conv_branch(node: Node) -> Branch | str:
    """The branch of a Conv, or why it has none."""
    layer = graph.layer_of(node)
    if isinstance(layer, str):
        return layer
    if graph.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return f"{node.name} pads automatically"
    rank = layer.weight.ndim - 2
    taps = layer.weight.shape[2:]
    pads: list[int] = graph.attribute(node, "pads", [0] * 2 * rank)
    dilations: list[int] = graph.attribute(node, "dilations", [1] * rank)
    bias = np.zeros(layer.weight.shape[0]) if layer.bias is None else layer.bias
    return Branch(
        source=layer.data,
        nodes=(node,),
        kernel=layer.weight.astype(np.float64),
        bias=bias.astype(np.float64),
        group=graph.attribute(node, "group", 1),
        strides=tuple(graph.attribute(node, "strides", [1] * rank)),
        dilations=tuple(d if k > 1 else 1 for d, k in zip(dilations, taps, strict=True)),
        begins=tuple(pads[:rank]),
        ends=tuple(pads[rank:]),
        cost=layer.weight.size,
    )


def norm_branch(node: Node, rank: int) -> Branch | str:
    """The branch of an inference-mode BatchNormalization over `rank` spatial axes, or why it has none."""
    pair = norm_affine(node)
    if isinstance(pair, str):
        return pair
    scale, shift = pair
    return _depthwise(node.inputs[0], (node,), scale, shift, rank)


def scale_branch(node: Node, channels: int, rank: int) -> Branch | str:
    """The branch of a node that multiplies by or adds a constant per channel (see `affine`), or why it has none."""
    affine = affine_of(node, Axis(rank, channels))
    if isinstance(affine, str):
        return f"{node.name}: {affine}"
    scale, shift = (np.broadcast_to(array, (channels,)) for array in (affine.scale, affine.shift))
    return _depthwise(affine.data, (node,), scale, shift, rank)


def identity_branch(source: Value, channels: int, rank: int) -> Branch:
    """The branch that returns `source` itself."""
    return _depthwise(source, (), np.ones(channels), np.zeros(channels), rank)


def pool_branch(node: Node, channels: int) -> Branch | str:
    """The branch of an AveragePool over `channels` channels, or why it has none."""
    taps: list[int] = graph.attribute(node, "kernel_shape", [])
    rank = len(taps)
    pads: list[int] = graph.attribute(node, "pads", [0] * 2 * rank)
    if graph.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID") or graph.attribute(node, "ceil_mode", 0):
        return f"{node.name} sizes itself"
    if any(pads) and not graph.attribute(node, "count_include_pad", 0):
        return f"{node.name} does not count its padding"
    dilations: list[int] = graph.attribute(node, "dilations", [1] * rank)
    kernel = np.full((channels, 1, *taps), 1.0 / np.prod(taps))
    return replace(
        _depthwise(node.inputs[0], (node,), np.ones(channels), np.zeros(channels), rank),
        kernel=kernel,
        strides=tuple(graph.attribute(node, "strides", [1] * rank)),
        dilations=tuple(d if k > 1 else 1 for d, k in zip(dilations, taps, strict=True)),
        begins=tuple(pads[:rank]),
        ends=tuple(pads[rank:]),
        cost=kernel.size,
    )


def _depthwise(source: Value | None, nodes: tuple[Node, ...], scale: Floats, bias: Floats, rank: int) -> Branch:
    assert source is not None
    one, zero = (1,) * rank, (0,) * rank
    kernel = scale.reshape(-1, 1, *one)
    return Branch(source, nodes, kernel, bias, len(scale), one, one, zero, zero, len(scale) if nodes else 0)


def insert_conv(model: Model, branch: Branch, like: Value, before: Node) -> Value:
    """Put a Conv that computes `branch` in front of `before`, named after it; returns its result, shaped as `like`."""
    name = str(before.name)
    weight = graph.add_constant(model, f"{name}.weight", branch.kernel.astype(np.float32))
    bias = graph.add_constant(model, f"{name}.bias", branch.bias.astype(np.float32))
    attributes: dict[str, int | list[int]] = {
        "kernel_shape": list(branch.taps),
        "strides": list(branch.strides),
        "dilations": list(branch.dilations),
        "pads": [*branch.begins, *branch.ends],
        "group": branch.group,
    }
    new = graph.add_node(
        model, "Conv", [branch.source, weight, bias], f"{name}_fused", before=before, attributes=attributes
    )
    new.shape, new.type = like.shape, like.type
    return new


def write_conv(model: Model, node: Node, branch: Branch) -> None:
    """Replace `node`, which returns the branch's result, and the branch's own nodes by one Conv."""
    old = node.outputs[0]
    new = insert_conv(model, branch, old, node)
    graph.redirect(old, new)
    if old.is_graph_output():
        graph.move_name(old, new, model)
    model.graph.remove(node, safe=True)
    for part in branch.nodes:
        if part is not node:
            model.graph.remove(part, safe=True)
