"""Neighbouring small groups of a convolution become one larger group whose new connections are zero.

    Conv(x; K, group = g)  ->  Conv(x; K', group = g / k)
    K'[o, (j mod k) * n + i] = K[o, i]   for output o of old group j, n inputs per old group;  0 elsewhere

Each output adds zeros to what it added before. A symmetric grid holds zero exactly and the largest weight of an output
channel stays, so the grids and the codes of the old weights stay, too. The runtime's integer kernel runs once per
group and needs some tens of channels to be worth its start: at 4 channels per group it takes twice the time of the
float kernel, at 32 half of it. The weights grow by the factor k. A convolution with one input and several output
channels per group gains, too; one with one output channel per group is depthwise, which has a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxq import graph
from onnxq.graph import Model, Node
from onnxq.passes.base import Pass
from onnxq.passes.branch_algebra import regrouped

WIDEST = 4
"""Merged groups hold at most this many times `channels`; wider ones were not measured."""


@dataclass(frozen=True)
class MergeGroups(Pass):
    """Merge the groups of grouped convolutions; depthwise ones stay.

    Attributes:
        channels: A merged group has at least this many input and output channels.
    """

    channels: int = 32

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of convolutions rewritten."""
        return sum(self._rewrite(model, node) for node in graph.nodes(model, "Conv"))

    def refused(self, model: Model) -> Mapping[str, str]:
        """Convolutions of small groups that stay: node name -> reason."""
        found = {str(node.name): self._merged(node) for node in graph.nodes(model, "Conv")}
        return {name: reason for name, reason in found.items() if isinstance(reason, str)}

    def _rewrite(self, model: Model, node: Node) -> int:
        layer, merged = graph.layer_of(node), self._merged(node)
        if isinstance(layer, str) or isinstance(merged, str) or merged == 1:
            return 0
        group = graph.attribute(node, "group", 1)
        wide = regrouped(layer.weight.astype(np.float64), group, group // merged)
        graph.replace_constant(model, node, 1, wide.astype(np.float32))
        graph.set_attribute(node, "group", group // merged)
        return 1

    def _merged(self, node: Node) -> int | str:
        """How many groups become one (1: nothing to do), or why they cannot."""
        group = graph.attribute(node, "group", 1)
        if group == 1:
            return 1
        layer = graph.layer_of(node)
        if isinstance(layer, str):
            return layer
        inputs, outputs = layer.weight.shape[1], layer.weight.shape[0] // group
        if inputs == outputs == 1 or min(inputs, outputs) >= self.channels:
            return 1
        least = -(-self.channels // min(inputs, outputs))
        merged = next((k for k in range(least, group + 1) if group % k == 0), group)
        widest = merged * max(inputs, outputs)
        if widest > WIDEST * self.channels:
            return f"{group} groups of {inputs} channels only merge into groups of {widest}"
        return merged
