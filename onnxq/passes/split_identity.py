"""A kernel whose middle tap is mostly one number per channel becomes a kernel without it, and that number beside it.

    Conv(x; K)  ->  Conv(x; K - D) + Conv(x; d, group = channels)       D[c, c, middle] = d[c]

Networks that were trained with branches and exported with these fused (RepVGG, MobileOne) hold an identity in the
middle of a dense kernel: one large weight per row, for which all others get a coarse step. Apart, the kernel fits its
grid, and the identity, one weight per channel, is exact on its own. This undoes, for integers, what `FuseBranches`
declines to do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from onnxq import graph
from onnxq.graph import Model, Node
from onnxq.passes.base import Pass
from onnxq.passes.branches import Branch, Floats, conv_branch

PARTS = ("_identity", "_with_identity")
"""What the names of the two new nodes add to that of the Conv."""


@dataclass(frozen=True)
class SplitIdentity(Pass):
    """Split dense kernels that a grid does not hold because of an identity in their middle.

    Attributes:
        floor_db: Kernels that keep this signal-to-noise ratio on an 8-bit grid with one step per output channel stay,
            as do those that do not reach it without their middle. None splits nothing.
    """

    floor_db: float | None = None

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of kernels split."""
        found = [] if self.floor_db is None else list(_splits(model, self.floor_db))
        for node, rest, factors in found:
            _write(model, node, rest, factors)
        return len(found)


def _splits(model: Model, floor_db: float) -> Iterator[tuple[Node, Branch, Floats]]:
    """Every node to split, its branch without the identity, and the identity's factors [channels]."""
    for node in graph.nodes(model, "Conv"):
        branch = conv_branch(node)
        if isinstance(branch, str) or not _keeps_place(branch) or branch.sqnr_db() >= floor_db:
            continue
        channels = np.arange(len(branch.kernel))
        taps = branch.kernel.reshape(len(channels), len(channels), -1).copy()
        middle = taps.shape[2] // 2
        factors = taps[channels, channels, middle]
        taps[channels, channels, middle] = 0.0
        rest = replace(branch, kernel=taps.reshape(branch.kernel.shape))
        if rest.sqnr_db() >= floor_db:
            yield node, rest, factors


def _write(model: Model, node: Node, rest: Branch, factors: Floats) -> None:
    """Give `node` its new kernel, and add the identity to its result.

    The first layer of the model stays the first, and the last one the last: these may have bits of their own.
    """
    old, (alone_name, total_name) = node.outputs[0], (f"{node.name}{part}" for part in PARTS)
    first = node is next(graph.nodes(model, *graph.LAYER_OPS))
    graph.replace_constant(model, node, 1, rest.kernel.astype(np.float32))
    kernel = factors.astype(np.float32).reshape(-1, 1, *[1] * len(rest.taps))
    weight = graph.add_constant(model, f"{alone_name}.weight", kernel)
    attributes: dict[str, int | list[int]] = {"kernel_shape": [1] * len(rest.taps), "group": len(factors)}
    before, after = (None, node) if first else (node, None)
    alone = graph.add_node(
        model, "Conv", [node.inputs[0], weight], alone_name, before=before, after=after, attributes=attributes
    )
    total = graph.add_node(model, "Add", [old, alone], total_name, after=alone.producer() if first else node)
    for value in (alone, total):
        value.shape, value.type = old.shape, old.type
    graph.redirect(old, total, skip=total.producer())
    if old.is_graph_output():
        graph.move_name(old, total, model)


def _keeps_place(branch: Branch) -> bool:
    """Whether it is dense, with as many outputs as inputs, and its middle tap reads the position that it writes."""
    outputs, inputs = branch.kernel.shape[:2]
    odd = all(taps % 2 for taps in branch.taps) and max(branch.taps) > 1
    same = all(
        begin == end == taps // 2 * step
        for begin, end, taps, step in zip(branch.begins, branch.ends, branch.taps, branch.dilations, strict=True)
    )
    return branch.group == 1 and outputs == inputs > 1 and odd and same and set(branch.strides) == {1}
