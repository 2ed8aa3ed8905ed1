"""A BatchNormalization that nothing could absorb becomes a depthwise convolution with one tap.

    BatchNormalization(x)  ->  Conv(x; K[c, 0] = t_c, b_c = beta_c - mean_c * t_c, group = channels)
    t = gamma / sqrt(var + eps)

The runtime has an integer kernel for the one and not for the other, and a kernel with a single weight per channel is
exact on a grid with one step per channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxq import graph
from onnxq.graph import Model, Node
from onnxq.passes.base import Pass
from onnxq.passes.branches import Branch, norm_branch, write_conv


@dataclass(frozen=True)
class NormToConv(Pass):
    """Rewrite the BatchNormalization nodes that are left."""

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of nodes rewritten."""
        done = 0
        for node in list(graph.nodes(model, "BatchNormalization")):
            branch = _branch(node)
            if isinstance(branch, Branch):
                write_conv(model, node, branch)
                done += 1
        return done

    def refused(self, model: Model) -> Mapping[str, str]:
        """Nodes that stay: node name -> reason."""
        found = {str(node.name): _branch(node) for node in graph.nodes(model, "BatchNormalization")}
        return {name: reason for name, reason in found.items() if isinstance(reason, str)}


def _branch(node: Node) -> Branch | str:
    value = node.inputs[0]
    if value is None or value.shape is None:
        return "the rank of its input is not known"
    if len(value.shape) not in (3, 4, 5):
        return "its input has no spatial axes"
    if len(node.outputs) > 1:
        return "it also returns statistics"
    if any(array is not None and array.dtype != np.float32 for array in map(graph.constant, node.inputs[1:])):
        return "its parameters are not float32"
    return norm_branch(node, len(value.shape) - 2)
