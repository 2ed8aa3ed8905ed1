"""A sum of parallel linear branches of one tensor becomes one Conv (RepVGG, MobileOne, ACNet and their kin).

    Add(branch(x), branch'(x))  ->  Conv(x)      with the kernels and biases added, see `branches`

A branch is a Conv, a BatchNormalization, an AveragePool or x itself. Sums of more than two fold from the inside out.
At least one branch is a Conv with constant weights, and no branch may be read by anybody else. Branches of different
grouping meet in the largest grouping that both divide into; a dense and a depthwise branch become a dense Conv only
when the dense one is there anyway.

X. Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", arXiv 2101.03697, section 3.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxq import graph
from onnxq.graph import Model, Node, Value
from onnxq.passes.base import Pass
from onnxq.passes.branches import (
    Branch,
    add_branches,
    conv_branch,
    identity_branch,
    norm_branch,
    pool_branch,
    write_conv,
)


@dataclass(frozen=True)
class FuseBranches(Pass):
    """Fuse sums of linear branches.

    Attributes:
        floor_db: Least signal-to-noise ratio of the fused kernel on an 8-bit grid with one step per output channel.
            A large identity among small weights makes a kernel that 8 bits cannot hold; such a branch is better
            added in integers. None fuses whatever is exact in float.
    """

    floor_db: float | None = None

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of sums removed."""
        fused = 0
        for add in list(graph.nodes(model, "Add")):
            branch = _fusible(add, self.floor_db)
            if isinstance(branch, Branch):
                write_conv(model, add, branch)
                fused += 1
        return fused

    def refused(self, model: Model) -> Mapping[str, str]:
        """Sums of two branches of one tensor that stay: name of the Add -> reason."""
        reasons = {str(add.name): _fusible(add, self.floor_db) for add in graph.nodes(model, "Add")}
        return {name: reason for name, reason in reasons.items() if isinstance(reason, str) and reason}


def _fusible(add: Node, floor_db: float | None) -> Branch | str:
    """The Conv that `add` can become, a reason against it, or "" when it is no sum of branches of one tensor."""
    operands = [value for value in add.inputs if value is not None]
    if len(operands) != 2 or operands[0] is operands[1]:
        return ""
    reasons = []
    for value, other in (operands, operands[::-1]):
        conv = graph.producer(value, "Conv")
        found = _sum(add, conv, other) if conv is not None else ""
        if isinstance(found, Branch) and floor_db is not None and found.sqnr_db() < floor_db:
            found = f"the fused kernel would keep only {found.sqnr_db():.0f} dB at 8 bits"
        if isinstance(found, Branch):
            return found
        reasons.append(found)
    return max(reasons, key=len)


def _sum(add: Node, conv: Node, other: Value) -> Branch | str:
    """`conv` plus `other` as one branch, or a reason, or "" when they do not read the same tensor."""
    source = conv.inputs[0]
    if source is None or not _reads(other, source):
        return ""
    first = conv_branch(conv)
    if isinstance(first, str):
        return first
    second = _branch(other, first)
    if isinstance(second, str):
        return second
    shared = [node for node in (*first.nodes, *second.nodes) if graph.only_user(node.outputs[0]) is not add]
    if shared:
        return f"{shared[0].name} is read elsewhere, too"
    return add_branches(first, second)


def _reads(value: Value, source: Value) -> bool:
    node = graph.producer(value, "Conv", "BatchNormalization", "AveragePool")
    return value is source or (node is not None and node.inputs[0] is source)


def _branch(value: Value, beside: Branch) -> Branch | str:
    """The branch behind `value`, which reads the same tensor as `beside`."""
    rank, outputs = len(beside.strides), len(beside.bias)
    inputs = beside.kernel.shape[1] * beside.group
    if value is beside.source:
        return identity_branch(value, outputs, rank) if inputs == outputs else "the identity has other channels"
    node = value.producer()
    assert node is not None
    if node.op_type == "Conv":
        return conv_branch(node)
    if node.op_type == "BatchNormalization":
        return norm_branch(node, rank)
    return pool_branch(node, inputs)
