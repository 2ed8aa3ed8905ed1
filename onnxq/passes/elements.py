"""Which elements of a node's input reach given elements of its output, for nodes that only move them.

Reshape, Squeeze, Unsqueeze, Flatten and Transpose move all of them; Split, Slice and Gather pick some. A set of
elements is a boolean array with as many axes as the tensor, of size 1 along the axes it does not depend on; so it can
be told where only the sizes of the axes it does depend on are known.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Node, Value

Elements = npt.NDArray[np.bool_]

RESHAPES = ("Reshape", "Squeeze", "Unsqueeze", "Flatten")
PICKS = ("Split", "Slice", "Gather")
MOVES = (*RESHAPES, "Transpose", *PICKS)


def behind(node: Node, output: Value, elements: Elements | None) -> Elements | str | None:
    """Elements of the first input of `node`, one of `MOVES`, that become `elements` of `output`; None is all of them.

    Returns a reason where that cannot be told.
    """
    if node.op_type == "Transpose":
        if elements is None:
            return None
        order: list[int] = graph.attribute(node, "perm", list(range(elements.ndim))[::-1])
        return elements.transpose(np.argsort(order))
    if node.op_type in RESHAPES:
        return None if elements is None else _reshaped(node, output, elements)
    return _picked(node, output, elements)


def meet(first: Elements | None, second: Elements | None) -> bool:
    """Whether two sets of elements of one tensor have one in common."""
    return bool(np.any((True if first is None else first) & (True if second is None else second)))


def _reshaped(node: Node, output: Value, elements: Elements) -> Elements | str:
    """The trailing axes on which `elements` depends, as those of the input that hold as many elements together."""
    before, after = _sizes(node.inputs[0]), _sizes(output)
    if before is None or after is None:
        return f"the shapes around {node.name} are not known"
    first = next((axis for axis, size in enumerate(elements.shape) if size > 1), len(after) - 1)
    tails = {_product(before[axis:]): axis for axis in range(len(before) - 1, -1, -1)}
    for cut in range(first, -1, -1):
        count = _product(after[cut:])
        start = tails.get(count) if count is not None else None
        if start is None:
            continue
        whole = np.broadcast_to(elements.reshape(elements.shape[cut:]), [size or 1 for size in after[cut:]])
        lengths = [size or 1 for size in before[start:]]
        return _compact(whole.reshape([1] * start + lengths))
    return f"{node.name} spreads the part that is scaled"


def _picked(node: Node, output: Value, elements: Elements | None) -> Elements | str:
    sizes = _sizes(node.inputs[0])
    if sizes is None:
        return f"the shape in front of {node.name} is not known"
    picks = _picks(node, output, sizes)
    if isinstance(picks, str):
        return picks
    rank = len(sizes) - sum(places.ndim == 0 for places in picks.values())
    found = np.ones([1] * rank, np.bool_) if elements is None else elements
    for axis, places in picks.items():
        if places.ndim == 0:
            found = np.expand_dims(found, axis)
        if places.size != len(set(places.reshape(-1).tolist())):
            return f"{node.name} picks an element twice"
        size = sizes[axis]
        assert size is not None
        spread = np.zeros([size if at == axis else length for at, length in enumerate(found.shape)], np.bool_)
        spread[(slice(None),) * axis + (places.reshape(-1),)] = found
        found = spread
    return _compact(found)


def _picks(node: Node, output: Value, sizes: list[int | None]) -> dict[int, npt.NDArray[np.int64]] | str:
    """Axis -> the places along it that `output` holds, in order; a lone number for an axis that disappears."""
    if node.op_type == "Slice":
        return _slices(node, sizes)
    axis = graph.attribute(node, "axis", 0) % len(sizes)
    size = sizes[axis]
    if size is None:
        return f"the size of the axis that {node.name} divides is not known"
    if node.op_type == "Gather":
        indices = graph.constant(node.inputs[1])
        if indices is None or indices.ndim > 1:
            return f"what {node.name} picks is not known"
        return {axis: indices.astype(np.int64) % size}
    lengths = [_along(value, axis) for value in node.outputs]
    place = next(index for index, value in enumerate(node.outputs) if value is output)
    if any(length is None for length in lengths) or sum(length or 0 for length in lengths) != size:
        return f"how {node.name} divides is not known"
    start = sum(length or 0 for length in lengths[:place])
    return {axis: np.arange(start, start + (lengths[place] or 0))}


def _slices(node: Node, sizes: list[int | None]) -> dict[int, npt.NDArray[np.int64]] | str:
    given = [graph.constant(value) for value in node.inputs[1:]]
    if len(given) < 2 or any(array is None for array, value in zip(given, node.inputs[1:], strict=True) if value):
        return f"what {node.name} picks is not known"
    lists = [array.reshape(-1).tolist() for array in given if array is not None]
    starts, ends = lists[0], lists[1]
    axes = given[2].reshape(-1).tolist() if len(given) > 2 and given[2] is not None else list(range(len(starts)))
    steps = given[3].reshape(-1).tolist() if len(given) > 3 and given[3] is not None else [1] * len(starts)
    picks = {}
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        size = sizes[axis]
        if size is None:
            return f"the size of the axis that {node.name} divides is not known"
        picks[axis % len(sizes)] = np.arange(size)[start:end:step]
    return picks


def _sizes(value: Value | None) -> list[int | None] | None:
    if value is None or value.shape is None:
        return None
    return [size if isinstance(size, int) else None for size in value.shape]


def _along(value: Value, axis: int) -> int | None:
    sizes = _sizes(value)
    return sizes[axis] if sizes is not None else None


def _product(sizes: list[int | None]) -> int | None:
    return None if any(size is None for size in sizes) else int(np.prod([size or 0 for size in sizes]))


def _compact(elements: Elements) -> Elements:
    """The same set, of size 1 along every axis that it does not depend on."""
    for axis in range(elements.ndim):
        one = elements.take([0], axis)
        if (elements == one).all():
            elements = one
    return elements
