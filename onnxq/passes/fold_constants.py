"""Whatever depends on constants alone is computed now.

Constant nodes become initializers. A node all of whose inputs are constants is folded, and so is one that
only reads folded nodes; onnxruntime evaluates them all at once and only the results that the rest of the
graph reads are kept.

Left alone: random operators, operators with a body, QuantizeLinear and DequantizeLinear (their pairs mean
something to the runtime) and results that would take more space than both a limit and their own inputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from onnxq import graph
from onnxq.errors import DataError, ModelError, UnsupportedError
from onnxq.passes.base import Pass
from onnxq.runtime import Session, SessionConfig

MOST_SECONDS = 60.0
"""What takes longer to compute stays."""
_RANDOM = {
    "Bernoulli",
    "Dropout",
    "Multinomial",
    "RandomNormal",
    "RandomNormalLike",
    "RandomUniform",
    "RandomUniformLike",
}
_QUANTIZED = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"}
_ITEM_BYTES = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
}


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Evaluate constant subgraphs.

    Attributes:
        max_bytes: A result larger than this and than the node's inputs together stays computed.
    """

    max_bytes: int = 64 << 20

    def __call__(self, model: graph.Model) -> int:
        """Rewrite `model` in place; returns the number of nodes removed."""
        before = len(model.graph)
        graph.lift_constants(model)
        while self._round(model):  # a folded shape can make the size of the next result known
            pass
        return before - len(model.graph)

    def refused(self, model: graph.Model) -> dict[str, str]:
        """Nodes that only read constants and stay: node name -> reason."""
        reasons = ((node, self._obstacle(node)) for node in _candidates(model))
        return {str(node.name): reason for node, reason in reasons if reason is not None}

    def _round(self, model: graph.Model) -> bool:
        if not _infer_if_needed(model):
            return False
        made: dict[graph.Value, None] = {}
        folded: list[graph.Node] = []
        for node in graph.nodes(model):
            if _reads_only(node, made) and self._obstacle(node) is None:
                folded.append(node)
                made.update(dict.fromkeys(node.outputs))
        inside = set(folded)
        wanted = [value for value in made if any(user not in inside for user in graph.users(value))]
        return bool(wanted) and _replace(model, folded, wanted)

    def _obstacle(self, node: graph.Node) -> str | None:
        """Why a node whose inputs are constants is not folded."""
        if node.op_type in _RANDOM:
            return f"{node.op_type} is random"
        if node.op_type in _QUANTIZED:
            return f"{node.op_type} is kept for the runtime"
        if node.domain not in ("", "ai.onnx"):
            return f"{node.op_type} is not a standard operator"
        if _has_body(node):
            return f"{node.op_type} has a body"
        if any(output.is_graph_output() for output in node.outputs):
            return "its result is an output of the model"
        return self._too_large(node)

    def _too_large(self, node: graph.Node) -> str | None:
        read = [_nbytes(value) for value in node.inputs if value is not None]
        made = [_nbytes(value) for value in node.outputs if value.name]
        if any(size is None for size in (*read, *made)):
            return "the size or type of its result is unknown"
        total = sum(size for size in made if size is not None)
        if total > max(self.max_bytes, sum(size for size in read if size is not None)):
            return f"its result would take {total >> 20} MiB"
        return None


def _candidates(model: graph.Model) -> Iterator[graph.Node]:
    return (node for node in graph.nodes(model) if _reads_only(node, {}))


def _reads_only(node: graph.Node, made: dict[graph.Value, None]) -> bool:
    """Whether a node reads something, and only initializers and values of `made`."""
    read = [value for value in node.inputs if value is not None]
    return bool(read) and all(_is_initializer(value) or value in made for value in read)


def _is_initializer(value: graph.Value) -> bool:
    return value.const_value is not None and value.producer() is None and not value.is_graph_input()


def _infer_if_needed(model: graph.Model) -> bool:
    """Make the shapes behind constants known; returns whether there is anything to fold at all."""
    first = next(_candidates(model), None)
    if first is None:
        return False
    made: dict[graph.Value, None] = {}
    for node in graph.nodes(model):
        if _reads_only(node, made):
            made.update(dict.fromkeys(node.outputs))
    if any(_nbytes(value) is None for value in made if value.name):
        graph.infer_shapes(model)
    return True


def _nbytes(value: graph.Value) -> int | None:
    """Bytes of a value of an ordinary element type; None when that cannot be told."""
    item = _ITEM_BYTES.get(graph.dtype_name(value) or "")
    if value.const_value is not None:
        return int(value.const_value.nbytes) if item is not None else None
    if item is None or value.shape is None:
        return None
    dims = [dim for dim in value.shape if isinstance(dim, int)]
    return item * math.prod(dims) if len(dims) == len(value.shape) else None


def _has_body(node: graph.Node) -> bool:
    return any(
        isinstance(entry, graph.Graph)
        for attr in node.attributes.values()
        for entry in (attr.value if isinstance(attr.value, tuple | list) else (attr.value,))
    )


def _replace(model: graph.Model, folded: list[graph.Node], wanted: list[graph.Value]) -> bool:
    """Evaluate `wanted` and put the results in the place of the nodes `folded`."""
    names = [graph.name_of(value) for value in wanted]
    part = graph.with_outputs(model, names, keep=False)
    part.graph.inputs.clear()  # nothing of it reads them
    try:
        results = Session(part, SessionConfig(threads=1, optimize="off")).run({}, limit_s=MOST_SECONDS)
    except (ModelError, DataError, UnsupportedError):  # no kernel, or endless: it would not run in the model either
        return False
    constants = []
    for value, name in zip(wanted, names, strict=True):
        constant = graph.add_constant(model, name, results[name])
        graph.redirect(value, constant)
        constants.append(constant)
    for node in reversed(folded):
        if not any(output.uses() for output in node.outputs):
            model.graph.remove(node, safe=True)
    for constant, name in zip(constants, names, strict=True):
        constant.name = name
    return True
