"""Cutting slices out of a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from onnxq import graph
from onnxq.errors import UnsupportedError, UsageError
from onnxq.torch_exec.binding import bind, refusal
from onnxq.torch_exec.ops import OPS
from onnxq.torch_exec.slice import Slice
from onnxq.torch_exec.tensors import DTYPES, from_numpy

OPSET_FLOOR = 13


def extract(model: graph.Model, inputs: Sequence[str], outputs: Sequence[str]) -> Slice:
    """The part of `model` that computes the values `outputs` from the values `inputs` and constants.

    Args:
        model: A loaded model; it is left as it is and not needed afterwards.
        inputs: Names of values that are fed: graph inputs, results of nodes, even constants.
        outputs: Names of values to return.

    Raises:
        UnsupportedError: A graph input that is not fed, or an operator, attribute or element type that has no
            counterpart here; the message names the node.
        UsageError: `model` has no such value.
    """
    if graph.opset(model) < OPSET_FLOOR:
        raise UnsupportedError(f"operator set {graph.opset(model)} cannot run in torch: {OPSET_FLOOR} is the oldest")
    values = graph.value_map(model)
    unknown = [name for name in (*inputs, *outputs) if name not in values]
    if unknown:
        raise UsageError(f"the model has no value {', '.join(unknown)}")
    needed, constants = _behind([values[name] for name in outputs], set(inputs))
    calls = []
    for node in graph.nodes(model):
        if node not in needed:
            continue
        if node.domain not in ("", "ai.onnx"):
            raise refusal(node, f"its domain is {node.domain}")
        if node.op_type not in OPS:
            raise refusal(node, "no such operator here")
        for value in (*node.inputs, *node.outputs):
            if value is not None and (graph.dtype_name(value) or "float32") not in DTYPES:
                raise refusal(node, f"element type {graph.dtype_name(value)} of {value.name} is not supported")
        calls.append(bind(node, OPS[node.op_type]))
    return Slice(calls, inputs, outputs, constants)


def _behind(ends: Sequence[graph.Value], stops: set[str]) -> tuple[set[graph.Node], dict[str, Tensor]]:
    """All nodes that `ends` need when the values named in `stops` are given, and the constants on the way."""
    needed: set[graph.Node] = set()
    constants: dict[str, Tensor] = {}
    open_ends = list(ends)
    while open_ends:
        value = open_ends.pop()
        name = graph.name_of(value)
        if name in stops or name in constants:
            continue
        array = graph.constant(value)
        node = graph.producer(value)
        if array is not None:
            if array.dtype.name not in DTYPES:
                raise UnsupportedError(f"constant {name} of type {array.dtype.name} cannot be a tensor in torch")
            constants[name] = from_numpy(array)
        elif node is None:
            raise UnsupportedError(f"the slice needs the graph input {name}, which it is not fed")
        elif node.op_type == "Constant" and node.domain in ("", "ai.onnx"):
            constants[name] = cast(Tensor, OPS["Constant"](**bind(node, OPS["Constant"]).attributes))
        elif node not in needed:
            needed.add(node)
            open_ends.extend(source for source in node.inputs if source is not None)
    return needed, constants
