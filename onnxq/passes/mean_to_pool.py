"""Means over all of space become GlobalAveragePool, for which the runtime has an integer kernel.

    ReduceMean(x, axes = all spatial, keepdims = 1)   ->  GlobalAveragePool(x)
    ReduceMean(x, axes = all spatial, keepdims = 0)   ->  Flatten(GlobalAveragePool(x), axis = 1)
    AveragePool(x, kernel = size of x, no padding)    ->  GlobalAveragePool(x)

for x of shape [N, C, ...]: each computes the mean over the same elements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from onnxq import graph


@dataclass(frozen=True)
class MeanToPool:
    """Rewrite spatial means as GlobalAveragePool."""

    def __call__(self, model: graph.Model) -> int:
        """Rewrite `model` in place; returns the number of means rewritten."""
        return sum(
            self._rewrite(model, node)
            for node in list(graph.nodes(model, "ReduceMean", "AveragePool"))
            if not self._reason(model, node)
        )

    def refused(self, model: graph.Model) -> Mapping[str, str]:
        """Means over the last axes of a tensor that are not rewritten: node name -> reason."""
        return {
            str(node.name): self._reason(model, node)
            for node in graph.nodes(model, "ReduceMean")
            if self._reason(model, node) and self._looks_spatial(model, node)
        }

    def _looks_spatial(self, model: graph.Model, node: graph.Node) -> bool:
        return sorted(axis % 4 for axis in _axes(model, node) or ()) == [2, 3]

    def _reason(self, model: graph.Model, node: graph.Node) -> str:
        value = node.inputs[0]
        rank = _rank(value)
        if rank is None:
            return "the rank of its input is not known"
        if rank < 3:
            return "its input has no spatial axes"
        if graph.dtype_name(value) != "float32":
            return f"it works on {graph.dtype_name(value)} values"
        if node.op_type == "AveragePool":
            return _partial_pool(node)
        axes = _axes(model, node)
        if axes is None or sorted(axis % rank for axis in axes) != list(range(2, rank)):
            return "it is not a mean over all spatial axes"
        return ""

    def _rewrite(self, model: graph.Model, node: graph.Node) -> int:
        old = node.outputs[0]
        keep = node.op_type == "AveragePool" or graph.attribute(node, "keepdims", 1) == 1
        new = graph.add_node(model, "GlobalAveragePool", [node.inputs[0]], f"{node.name}_pool", before=node)
        if not keep:
            new = graph.add_node(model, "Flatten", [new], f"{node.name}_flat", before=node, attributes={"axis": 1})
        new.shape, new.type = old.shape, old.type
        graph.redirect(old, new)
        if old.is_graph_output():
            graph.move_name(old, new, model)
        model.graph.remove(node, safe=True)
        return 1


def _rank(value: graph.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None


def _axes(model: graph.Model, node: graph.Node) -> list[int] | None:
    """Axes of a ReduceMean: an attribute before opset 18, an input from then on."""
    if graph.opset(model) < 18:
        return graph.attribute(node, "axes", None)
    array = graph.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if array is None else [int(axis) for axis in array.reshape(-1)]


def _partial_pool(node: graph.Node) -> str:
    value = node.inputs[0]
    assert value is not None
    assert value.shape is not None
    space = list(value.shape)[2:]
    kernel: list[int] = graph.attribute(node, "kernel_shape", [])
    pads: list[int] = graph.attribute(node, "pads", [])
    if graph.attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        return "its padding is automatic"
    if any(pads) or space != kernel or any(d != 1 for d in graph.attribute(node, "dilations", [1])):
        return "it does not cover the whole of space"
    return ""
