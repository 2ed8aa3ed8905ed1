"""Recognising normalisations that end in a scale and a shift per channel.

    y = gamma * n(x) + beta          n: layer, RMS, group or instance normalisation

written as one operator, as an operator followed by Mul and Add, or as the chain of small operators that exporters
wrote before there was one (see `norm_chains`). BatchNormalization is none of them: it folds into the layer before it.

J. L. Ba et al., "Layer Normalization", arXiv 1607.06450; B. Zhang, R. Sennrich, "Root Mean Square Layer
Normalization", arXiv 1910.07467; Y. Wu, K. He, "Group Normalization", arXiv 1803.08494.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Model, Node, Value
from onnxq.passes.norm_chains import Kind, Norm, affine_after, chain_at

_LAST_AXIS = {"LayerNormalization": "layer", "RMSNormalization": "rms", "SimplifiedLayerNormalization": "rms"}
_CHANNEL_AXIS = {"InstanceNormalization": "instance", "GroupNormalization": "group"}
_EPSILON = 1e-5
"""What the operators use where the attribute is absent."""


def norms(model: Model) -> Iterator[tuple[Node, Norm | str]]:
    """Every normalisation of the main graph, at its head node, or the reason why it is not understood.

    A head is a normalisation operator, or the Sqrt of a chain that looks like one.
    """
    for node in graph.nodes(model, "Sqrt", *_LAST_AXIS, *_CHANNEL_AXIS):
        found = norm_at(node)
        if found:
            yield node, found


def norm_at(node: Node) -> Norm | str:
    """The normalisation whose head is `node`, the reason why it is not understood, or "" where there is none."""
    if node.op_type == "Sqrt":
        found = chain_at(node)
        return found if isinstance(found, str) else _closed(found)
    if node.op_type in _LAST_AXIS:
        return _over_last_axis(node)
    if node.op_type in _CHANNEL_AXIS:
        found = _over_space(node)
        return found if isinstance(found, str) else _closed(found)
    return ""


def _closed(norm: Norm) -> Norm | str:
    """`norm`, unless something else reads a value inside it."""
    inside = set(norm.nodes)
    for node in norm.nodes[:-1]:
        for value in node.outputs:
            if value.is_graph_output() or any(user not in inside for user in graph.users(value)):
                return f"{value.name} inside it is read elsewhere, too"
    return norm


def _over_last_axis(node: Node) -> Norm | str:
    source = node.inputs[0]
    assert source is not None
    rank = len(source.shape) if source.shape is not None else None
    axis = graph.attribute(node, "axis", -1)
    if axis != -1 and (rank is None or axis != rank - 1):
        return "it normalises over more than the last axis"
    kind: Kind = "layer" if node.op_type == "LayerNormalization" else "rms"
    gamma = graph.constant(node.inputs[1])
    beta = graph.constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if gamma is None or (beta is None and len(node.inputs) > 2 and node.inputs[2] is not None):
        return "its scale or shift is not a constant"
    if gamma.dtype != np.float32:
        return f"its scale is {gamma.dtype}"
    if gamma.ndim != 1 or (beta is not None and beta.shape != gamma.shape):
        return "its scale and shift are not one value per channel"
    shift = (node, 2) if kind == "layer" else None
    epsilon = graph.attribute(node, "epsilon", _EPSILON)
    return Norm((node,), source, node.outputs[0], gamma, beta, (node, 1), shift, -1, epsilon, kind)


def _over_space(node: Node) -> Norm | str:
    """Group or instance normalisation; torch writes the former as Reshape, InstanceNormalization, Reshape, Mul, Add."""
    source = node.inputs[0]
    assert source is not None
    gamma, beta = graph.constant(node.inputs[1]), graph.constant(node.inputs[2])
    if gamma is None or beta is None:
        return "its scale or shift is not a constant"
    if gamma.dtype != np.float32:
        return f"its scale is {gamma.dtype}"
    kind: Kind = "group" if node.op_type == "GroupNormalization" else "instance"
    epsilon = graph.attribute(node, "epsilon", _EPSILON)
    regrouped = _regrouped(node)
    nodes: tuple[Node, ...] = (node,)
    output = node.outputs[0]
    if regrouped is not None:
        nodes, source, output, kind = regrouped
    if source.shape is None:
        return "the rank of its input is not known"
    rank, channels = len(source.shape), source.shape[1]
    if not isinstance(channels, int):
        return "the number of its channels is not known"
    after = affine_after(output, 1 - rank, channels)
    bare = Norm(nodes, source, output, gamma, beta, (node, 1), (node, 2), 1 - rank, epsilon, kind)
    if after is not None:
        last = after.nodes[-1].outputs[0]
        return replace(
            bare, nodes=nodes + after.nodes, output=last,
            gamma=after.gamma, beta=after.beta, gamma_at=after.gamma_at, beta_at=after.beta_at,
        )  # fmt: skip
    if regrouped is not None:
        return "its scale is one value per group, not per channel"
    return bare


def _regrouped(node: Node) -> tuple[tuple[Node, ...], Value, Value, Kind] | None:
    """Nodes, input, output and kind where `node` normalises groups of channels between two Reshapes."""
    before, after = graph.producer(node.inputs[0], "Reshape"), graph.only_user(node.outputs[0])
    if node.op_type != "InstanceNormalization" or before is None or after is None or after.op_type != "Reshape":
        return None
    source, output = before.inputs[0], after.outputs[0]
    if source is None or source.shape is None or output.shape is None or len(source.shape) != len(output.shape):
        return None
    same = all(
        old == new or not (isinstance(old, int) and isinstance(new, int))
        for old, new in zip(source.shape, output.shape, strict=True)
    )
    if not same or not isinstance(source.shape[1], int) or source.shape[1] != output.shape[1]:
        return None
    return (before, node, after), source, output, "group"


def per_channel(array: npt.NDArray[np.float32], norm: Norm) -> npt.NDArray[np.float32]:
    """`array` of shape [channels] in the shape in which `norm` stores its scale and shift.

    An operator takes a vector; a Mul or Add takes what broadcasts along the channel axis.
    """
    if norm.gamma_at[0].op_type in _LAST_AXIS | _CHANNEL_AXIS:
        return array
    return array.reshape([-1] + [1] * (-norm.axis - 1))


__all__ = ["Norm", "norm_at", "norms", "per_channel"]
