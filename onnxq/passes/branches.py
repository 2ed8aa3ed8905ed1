"""A linear branch: anything that is a convolution of one tensor, in one form.

    Conv                    K, b                                                      as stored
    BatchNormalization      K[o, 0] = gamma / sqrt(var + eps) at one tap, depthwise,  b = beta - mean * K
    AveragePool             K[o, 0] = 1 / taps, depthwise                             where padding counts as values
    the tensor itself       K[o, 0] = 1 at one tap, depthwise

A tap at index i of a kernel with padding p and dilation d reads the input at  o * stride + i * d - p  for output
position o. Two branches of equal stride may be added when their taps lie on one lattice and their outputs have equal
sizes whatever the input's size: then the sum of their kernels, each laid at its own offsets, is their sum. Positions
outside the input read zero in both forms.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Model, Node, Value

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Branch:
    """A convolution of `source`.

    Attributes:
        source: The tensor it reads.
        nodes: The nodes it consists of; none for the tensor itself.
        kernel: [outputs, inputs per group, *kernel], float64.
        bias: [outputs], float64.
        group: Number of groups.
        strides: Per spatial axis.
        dilations: Per spatial axis; 1 where the kernel has one tap.
        begins: Padding in front, per spatial axis.
        ends: Padding behind, per spatial axis.
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

    @property
    def taps(self) -> tuple[int, ...]:
        """Kernel size per spatial axis."""
        return self.kernel.shape[2:]

    def shrink(self, axis: int) -> int:
        """How much larger the padded input is than the span of outputs: equal for branches of equal output size."""
        return self.begins[axis] + self.ends[axis] - (self.taps[axis] - 1) * self.dilations[axis]

    def sqnr_db(self) -> float:
        """Signal-to-noise ratio of the kernel on an 8-bit grid with one step per output channel, decibels."""
        rows = self.kernel.reshape(len(self.kernel), -1)
        steps = np.maximum(np.abs(rows).max(axis=1, keepdims=True), 1e-30) / 127
        error = rows - np.rint(rows / steps) * steps
        return float(10 * np.log10((rows**2).sum() / max((error**2).sum(), 1e-30)))


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
    )


def norm_branch(node: Node, rank: int) -> Branch | str:
    """The branch of an inference-mode BatchNormalization over `rank` spatial axes, or why it has none."""
    statistics = [graph.constant(value) for value in node.inputs[1:5]]
    if graph.attribute(node, "training_mode", 0) or any(array is None for array in statistics):
        return f"{node.name} is in training mode or its parameters are not constants"
    gamma, beta, mean, variance = (np.asarray(array, np.float64) for array in statistics)
    scale = gamma / np.sqrt(variance + graph.attribute(node, "epsilon", 1e-5))
    return _depthwise(node.inputs[0], (node,), scale, beta - mean * scale, rank)


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
    whole = _depthwise(node.inputs[0], (node,), np.ones(channels), np.zeros(channels), rank)
    kernel = np.full((channels, 1, *taps), 1.0 / np.prod(taps))
    dilations: list[int] = graph.attribute(node, "dilations", [1] * rank)
    return Branch(
        whole.source,
        whole.nodes,
        kernel,
        whole.bias,
        channels,
        tuple(graph.attribute(node, "strides", [1] * rank)),
        tuple(d if k > 1 else 1 for d, k in zip(dilations, taps, strict=True)),
        tuple(pads[:rank]),
        tuple(pads[rank:]),
    )


def _depthwise(source: Value | None, nodes: tuple[Node, ...], scale: Floats, bias: Floats, rank: int) -> Branch:
    assert source is not None
    one, zero = (1,) * rank, (0,) * rank
    return Branch(source, nodes, scale.reshape(-1, 1, *one), bias, len(scale), one, one, zero, zero)


def add_branches(first: Branch, second: Branch) -> Branch | str:
    """The branch that returns the sum of two branches of one tensor, or why there is none."""
    if first.strides != second.strides:
        return f"strides {first.strides} and {second.strides} differ"
    if len(first.bias) != len(second.bias):
        return f"{len(first.bias)} and {len(second.bias)} channels cannot be added"
    dilations = []
    for axis in range(len(first.strides)):
        if first.shrink(axis) != second.shrink(axis):
            return "their outputs differ in size"
        steps = {b.dilations[axis] for b in (first, second) if b.taps[axis] > 1}
        if len(steps) > 1:
            return f"dilations {sorted(steps)} differ"
        step = steps.pop() if steps else 1
        if (first.begins[axis] - second.begins[axis]) % step:
            return "their taps do not meet"
        dilations.append(step)
    group = int(np.gcd(first.group, second.group))
    begins = tuple(max(pair) for pair in zip(first.begins, second.begins, strict=True))
    wide = [_laid(branch, group, begins, dilations) for branch in (first, second)]
    taps = np.maximum(wide[0].shape[2:], wide[1].shape[2:])
    kernel = sum(_behind(part, taps) for part in wide)
    assert isinstance(kernel, np.ndarray)
    ends = tuple(
        first.shrink(axis) - begins[axis] + (int(taps[axis]) - 1) * dilations[axis] for axis in range(len(taps))
    )
    if min(ends) < 0:
        return "their padding would have to be negative"
    nodes = (*first.nodes, *second.nodes)
    bias = first.bias + second.bias
    return Branch(first.source, nodes, kernel, bias, group, first.strides, tuple(dilations), begins, ends)


def _laid(branch: Branch, group: int, begins: tuple[int, ...], dilations: list[int]) -> Floats:
    """The branch's kernel in `group` groups, with empty taps in front so that its padding becomes `begins`."""
    kernel = _regrouped(branch.kernel, branch.group, group)
    front = [(wanted - own) // step for wanted, own, step in zip(begins, branch.begins, dilations, strict=True)]
    return np.pad(kernel, [(0, 0), (0, 0), *((count, 0) for count in front)])


def _behind(kernel: Floats, taps: npt.NDArray[np.int64]) -> Floats:
    missing = [(0, int(wanted) - own) for wanted, own in zip(taps, kernel.shape[2:], strict=True)]
    return np.pad(kernel, [(0, 0), (0, 0), *missing])


def _regrouped(kernel: Floats, group: int, fewer: int) -> Floats:
    """A kernel of `group` groups as one of `fewer` groups; connections across the old groups are zero."""
    if group == fewer:
        return kernel
    outputs, inputs = kernel.shape[:2]
    merged = group // fewer
    wide = np.zeros((outputs, inputs * merged, *kernel.shape[2:]))
    for output in range(outputs):
        start = (output // (outputs // group)) % merged * inputs
        wide[output, start : start + inputs] = kernel[output]
    return wide


def write_conv(model: Model, node: Node, branch: Branch) -> None:
    """Replace `node`, which returns the branch's result, and the branch's own nodes by one Conv."""
    name = str(node.name)
    weight = graph.add_constant(model, f"{name}.weight", branch.kernel.astype(np.float32))
    bias = graph.add_constant(model, f"{name}.bias", branch.bias.astype(np.float32))
    attributes: dict[str, int | list[int]] = {
        "kernel_shape": list(branch.taps),
        "strides": list(branch.strides),
        "dilations": list(branch.dilations),
        "pads": [*branch.begins, *branch.ends],
        "group": branch.group,
    }
    old = node.outputs[0]
    new = graph.add_node(
        model, "Conv", [branch.source, weight, bias], f"{name}_fused", before=node, attributes=attributes
    )
    new.shape, new.type = old.shape, old.type
    graph.redirect(old, new)
    if old.is_graph_output():
        graph.move_name(old, new, model)
    model.graph.remove(node, safe=True)
    for part in branch.nodes:
        if part is not node:
            model.graph.remove(part, safe=True)
