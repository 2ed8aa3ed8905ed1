"""An average over windows becomes a depthwise convolution, whose integer kernel is faster.

    AveragePool(x; kernel, strides, pads)  ->  Conv(x; K[c, 0] = 1 / taps, group = channels, strides, pads)

where every window divides by the same number: without padding, or where padding counts as zeros. A kernel whose
weights are all equal is exact on a grid with one step per channel. A pool that returns one position reads everything
once and is better off as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxq import graph
from onnxq.graph import Model, Node
from onnxq.passes.base import Pass
from onnxq.passes.branches import Branch, pool_branch, write_conv


@dataclass(frozen=True)
class PoolToConv(Pass):
    """Rewrite AveragePool over two spatial axes."""

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of pools rewritten."""
        done = 0
        for node in list(graph.nodes(model, "AveragePool")):
            branch = _branch(node)
            if isinstance(branch, Branch):
                write_conv(model, node, branch)
                done += 1
        return done

    def refused(self, model: Model) -> Mapping[str, str]:
        """Pools that stay: node name -> reason."""
        found = {str(node.name): _branch(node) for node in graph.nodes(model, "AveragePool")}
        return {name: reason for name, reason in found.items() if isinstance(reason, str)}


def _branch(node: Node) -> Branch | str:
    value, output = node.inputs[0], node.outputs[0]
    if value is None or value.shape is None:
        return "the rank of its input is not known"
    if len(value.shape) != 4:
        return "it does not pool over two axes"
    channels = value.shape[1]
    if not isinstance(channels, int):
        return "the number of its channels is not known"
    if graph.dtype_name(value) != "float32":
        return f"it works on {graph.dtype_name(value)} values"
    if output.shape is not None and list(output.shape)[2:] == [1, 1]:
        return "it returns one position"
    return pool_branch(node, channels)
