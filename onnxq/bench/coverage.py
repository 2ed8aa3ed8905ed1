"""Integer coverage: which multiply-accumulates the runtime executes in integer kernels.

What counts is the graph that the runtime has optimised, not the one in the file. There, a node that was fused
into an integer kernel is found again by its weight: the kernel reads the stored integers under the name they
have in the file, or the one that folding gave them where nodes unpack them. Where the weight does not tell -
products of two activations, weights that the runtime rewrote or that several nodes share - the node's name does;
the runtime keeps it, with a suffix at times. A node that is found neither way runs in float.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from onnxq import graph
from onnxq.bench.inputs import fixed_batch, make_feeds
from onnxq.bench.macs import MATRIX_OPS, float_macs, matrix_nodes, matrix_tensors, weight_macs
from onnxq.errors import DataError, UsageError
from onnxq.runtime import Session, SessionConfig, optimized
from onnxq.types import Coverage, FloatNode

UNFUSED = "the runtime found no integer kernel for its quantized operands"
UNQUANTIZED = "its operands are not quantized"
_DEFAULT = SessionConfig()
_INT8_ACCURACY = 4
"""MatMulNBits multiplies in 8-bit integers from this accuracy level on."""
_SUFFIX = re.compile(r"_token_\d+$|/\w*Fusion\w*/?$")
_CARRIERS = ("DequantizeLinear", "QuantizeLinear", "Cast", "Transpose", "Reshape", "Identity")


def kernels(model: Path | graph.Model, config: SessionConfig = _DEFAULT) -> Mapping[str, int]:
    """Number of nodes by operator in the graph that the runtime executes, the most frequent first."""
    return _histogram(_executed(model, config))


def coverage(
    quantized: Path | graph.Model,
    macs: Mapping[str, int],
    *,
    config: SessionConfig = _DEFAULT,
    reasons: Mapping[str, str] | None = None,
) -> Coverage:
    """Integer coverage of a quantized model whose nodes keep the float model's names.

    Args:
        quantized: The model as emitted.
        macs: Multiply-accumulates per row by node name of the float model: `float_macs`.
        config: Provider and threads; the graph is always optimised fully. The provider must be one whose
            optimised graph can be saved (one that compiles subgraphs for itself cannot).
        reasons: Node name -> why it was left in float.

    Returns:
        The coverage; its `floats` hold the heaviest nodes first.
    """
    model = graph.load(quantized) if isinstance(quantized, Path) else quantized
    executed = _executed(model, config)
    owners = _owners(model, macs)
    integer = {name for node in _integer_kernels(executed) for name in _origins(node, owners, macs)}
    known = graph.node_names(model)
    floats = [
        FloatNode(
            name=name,
            op_type=known[name].op_type if name in known else "",
            reason=(reasons or {}).get(name) or _guess(known.get(name)),
            macs=count,
        )
        for name, count in macs.items()
        if name not in integer
    ]
    return Coverage(
        integer_macs=sum(macs[name] for name in integer),
        total_macs=sum(macs.values()),
        kernels=_histogram(executed),
        floats=tuple(sorted(floats, key=lambda node: -node.macs)),
        constant_bytes=graph.nbytes(executed),
    )


def foreign_coverage(
    quantized: Path | graph.Model,
    *,
    config: SessionConfig = _DEFAULT,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Coverage:
    """Integer coverage of any quantized file, QDQ or not, without the float model.

    The work is counted in one run of the file on a made-up row. Where its inputs cannot be made up, every
    weight element counts as one multiply-accumulate.

    Args:
        quantized: Any model.
        config: Provider and threads.
        shapes: Sizes of free input axes.
    """
    model = graph.load(quantized) if isinstance(quantized, Path) else quantized
    return coverage(model, _counted(model, config, shapes), config=config)


def _counted(
    model: graph.Model, config: SessionConfig, shapes: Mapping[str, tuple[int, ...]] | None
) -> Mapping[str, int]:
    wanted = matrix_tensors(model)
    if not wanted:
        return {}
    session = Session(graph.with_outputs(model, wanted, keep=False), replace(config, optimize="basic", profile=None))
    rows = fixed_batch(session.inputs) or 1
    try:
        seen = session.run(make_feeds(session.inputs, rows, shapes=shapes))
    except (UsageError, DataError):
        return weight_macs(model)
    return float_macs(model, {name: array.shape for name, array in seen.items()}, rows)


def _executed(model: Path | graph.Model, config: SessionConfig) -> graph.Model:
    return optimized(model, replace(config, optimize="all", profile=None))


def _histogram(executed: graph.Model) -> Mapping[str, int]:
    return dict(Counter(node.op_type for node in executed.graph.all_nodes()).most_common())


def _integer_kernels(executed: graph.Model) -> Iterator[graph.Node]:
    for node in graph.nodes(executed):
        op = MATRIX_OPS.get(node.op_type)
        if op is None:
            continue
        if op.integer or (op.kind == "nbits" and graph.attribute(node, "accuracy_level", 0) >= _INT8_ACCURACY):
            yield node


def _owners(model: graph.Model, macs: Mapping[str, int]) -> Mapping[str, set[str]]:
    """Names that a stored weight has in the file, or gets by folding -> the nodes that use it."""
    owners: dict[str, set[str]] = {}
    for node, op in matrix_nodes(model):
        if node.name in macs:
            for name in (*_weight_names(node.inputs[op.right]), *_weight_names(node.inputs[op.left])):
                owners.setdefault(name, set()).add(str(node.name))
    return owners


def _weight_names(value: graph.Value | None) -> list[str]:
    """Names from an operand back to the constant behind it; none when there is no constant."""
    names: list[str] = []
    while value is not None:
        names.append(graph.name_of(value))
        node = graph.producer(value)
        if node is None:
            return names if value.is_initializer() and not value.is_graph_input() else []
        if node.op_type == "Constant":
            return names
        if node.op_type not in _CARRIERS:  # nodes that unpack a constant
            return names if graph.sources(value) is not None else []
        value = node.inputs[0]
    return []


def _origins(kernel: graph.Node, owners: Mapping[str, set[str]], macs: Mapping[str, int]) -> set[str]:
    """The nodes of the file that became `kernel`."""
    by_name = _original_name(str(kernel.name), macs)
    users: set[str] = set()
    for value in kernel.inputs:
        if value is not None and value.name:
            users |= owners.get(value.name, set())
    if len(users) == 1:
        return users
    if by_name is not None and (not users or by_name in users):
        return {by_name}
    return set()


def _original_name(name: str, macs: Mapping[str, int]) -> str | None:
    """`name` without what the runtime appended, if that is a node that is counted."""
    while name not in macs:
        shorter = _SUFFIX.sub("", name)
        if shorter == name:
            return None
        name = shorter
    return name


def _guess(node: graph.Node | None) -> str:
    """Why a node is in float when nobody said so."""
    op = MATRIX_OPS.get(node.op_type) if node is not None else None
    if node is None or op is None:
        return UNQUANTIZED
    operands = (node.inputs[op.left], node.inputs[op.right])
    quantized = all(graph.producer(value, "DequantizeLinear") is not None for value in operands)
    return UNFUSED if quantized else UNQUANTIZED
