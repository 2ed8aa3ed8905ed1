"""Blocks and stages: the pieces that a network is tuned and shown by, found in any graph.

A block is a region between cut tensors (`onnxq.plan.cuts`) that holds at least one layer: a residual block, half of a
transformer layer, or a single layer of a chain. Three rules make blocks out of regions:

* A region without layers joins the one in front of it (the Relu behind a convolution), unless it shrinks its tensor
  (pooling, flattening, the choice of one token): then it joins the one behind, so that a block ends on its own
  resolution. What precedes the first layer is a block without layers.
* A region of more than `limit` layers (long skips leave a graph few cuts) is split where the fewest tensors cross.
* Nodes beside the flow (shapes, masks) belong to the first block that needs them.

A stage is a chain of consecutive blocks whose results have the same spatial size.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from onnxq import graph
from onnxq.graph import Model, Node, Value
from onnxq.plan.cuts import flow_of, values_read
from onnxq.plan.regions import assigned, pieces_of

Signature = tuple[int | str, ...]


@dataclass(frozen=True)
class Block:
    """A piece of a model that runs as a whole.

    Attributes:
        name: Short and unique: from its first layer's node, or "block_3" for the fourth block when it has no layer.
        inputs: Values it reads that earlier blocks or the model's user make, in the order in which it reads them.
        outputs: Values it makes that later blocks read or the model returns, in the order in which it makes them.
        nodes: Names of its nodes, in order.
        layers: Names of its weighted nodes, in order.
        stage: Number of its stage, from 0.
    """

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    layers: tuple[str, ...]
    stage: int


def find_blocks(model: Model, *, limit: int = 8) -> tuple[Block, ...]:
    """The blocks of `model` in topological order; together they hold each node of the main graph exactly once.

    Shapes and element types must be known where they can be (`onnxq.graph.infer_shapes`): a value of unknown type
    counts as float, a block whose result has an unknown spatial size is a stage of its own.

    Args:
        model: Left as it is.
        limit: Largest number of layers of a block that had to be split off; a block between two cut tensors never
            has more either.

    Raises:
        ValueError: `limit` is below 1.
    """
    if limit < 1:
        raise ValueError(f"a block must be allowed one layer at least, not {limit}")
    flow = flow_of(model)
    groups = [[flow.nodes[i] for i in group] for group in assigned(flow, pieces_of(flow, limit))]
    taken = dict(zip(flow.nodes, flow.taken, strict=True))
    return _described(model, groups, {flow.nodes[i] for i in flow.layers}, taken)


def layer_slices(model: Model) -> tuple[Block, ...]:
    """One block per layer of `model`, in order: the weighted node, the Add of its bias and the activation it absorbs.

    Other nodes are in no block.
    """
    groups = []
    for node in graph.nodes(model, *graph.LAYER_OPS):
        layer = graph.layer_of(node)
        if not isinstance(layer, str):
            activation = graph.activation_after(layer.output)
            parts = (node, layer.bias_add, activation.node if activation is not None else None)
            groups.append([part for part in parts if part is not None])
    taken = {node: values_read(node) for node in graph.nodes(model)}
    return _described(model, groups, {group[0] for group in groups}, taken)


def _described(
    model: Model, groups: Sequence[Sequence[Node]], layers: set[Node], taken: Mapping[Node, list[Value]]
) -> tuple[Block, ...]:
    leaving = _leaving(model, taken, {node: index for index, group in enumerate(groups) for node in group})
    names: set[str] = set()
    blocks: list[Block] = []
    last: Signature | None = None
    stage = -1
    for index, group in enumerate(groups):
        inside = [node for node in group if node in layers]
        made = [value for node in group for value in node.outputs if value.name]
        outputs = [value for value in made if value in leaving]
        signature = _signature(outputs)
        if signature is None or signature != last:
            stage += 1
        last = signature
        blocks.append(
            Block(
                name=_name(inside, index, names),
                inputs=_inputs((value for node in group for value in taken[node]), set(made)),
                outputs=tuple(graph.name_of(value) for value in outputs),
                nodes=tuple(str(node.name) for node in group),
                layers=tuple(str(node.name) for node in inside),
                stage=stage,
            )
        )
    return tuple(blocks)


def _inputs(read: Iterable[Value], made: set[Value]) -> tuple[str, ...]:
    return tuple(graph.name_of(value) for value in dict.fromkeys(read) if value not in made and not _is_constant(value))


def _is_constant(value: Value) -> bool:
    return value.is_initializer() and not value.is_graph_input()


def _leaving(model: Model, taken: Mapping[Node, list[Value]], home: Mapping[Node, int]) -> set[Value]:
    """Values that the model returns or that nodes outside of their own block read."""
    found = {value for value in model.graph.outputs if value.producer() is not None}
    for node, values in taken.items():
        for value in values:
            maker = value.producer()
            if maker is not None and home.get(maker, -1) != home.get(node, -1):
                found.add(value)
    return found


def _name(layers: Sequence[Node], index: int, taken: set[str]) -> str:
    """The first layer's path without the operator at its end, at most four names deep."""
    wanted = f"block_{index}"
    if layers:
        path = [part for part in str(layers[0].name).split("/") if part]
        if len(path) > 1 and path[-1].split("_")[0] == layers[0].op_type:
            path = path[:-1]
        wanted = "/".join(path[-4:]) or wanted
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name


def _signature(outputs: Sequence[Value]) -> Signature | None:
    """Number of axes and the sizes that mark a stage: all behind the channels, or all but the batch for a matrix."""
    floats = [value for value in outputs if "float" in (graph.dtype_name(value) or "float")]
    if not floats or floats[-1].shape is None:
        return None
    sizes = [size if isinstance(size, int) else size.value for size in floats[-1].shape]
    kept = sizes[2:] if len(sizes) > 2 else sizes[1:]
    known = [size for size in kept if size is not None]
    return (len(sizes), *known) if len(known) == len(kept) else None
