"""Weight codes looked up in codebooks, which the runtime does once, when it creates a session.

    index int8 -> Cast(int32) -> Gather(book [size])                                     -> int8 codes, one book for all
    index int8 -> Cast(int32) -> GatherElements(books [channels, size], axis 1) -> Reshape      -> a book per channel

Where the channels are the last of two axes, as in MatMul, books are [size, channels], looked up along axis 0, and
nothing is reshaped. An index is packed like a weight code of so few bits (`packing`); so it is counted from
-(size // 2) on, and a book begins in its middle: negative indices count from the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Model, Node, Value
from onnxq.types import WeightGrid

Codes = npt.NDArray[np.int8]
NODES = 3
"""Nodes behind the index: Cast, the look-up and Reshape."""


@dataclass(frozen=True)
class Book:
    """A weight as indices into codebooks.

    Attributes:
        index: int8, -(size // 2) to (size - 1) // 2; in the weight's shape, or [channels, weights of a channel].
        table: The codebooks, int8 [size], [channels, size] or [size, channels], the middle of each one first.
        axis: Along which a code is looked up; None for a single codebook.
        shape: Of the weight.
    """

    index: Codes
    table: Codes
    axis: int | None
    shape: tuple[int, ...]

    def look_up(self, model: Model, name: str, index: Value, before: Node) -> Value:
        """Add the nodes that turn `index` into the int8 codes called `name`, in front of the node `before`."""
        to = {"to": graph.INT32}
        rows = graph.add_node(model, "Cast", [index], f"{name}_rows", before=before, attributes=to)
        table = graph.add_constant(model, f"{name}_book", self.table)
        if self.axis is None:
            return graph.add_node(model, "Gather", [table, rows], name, before=before)
        along = {"axis": self.axis}
        if self.index.shape == self.shape:
            return graph.add_node(model, "GatherElements", [table, rows], name, before=before, attributes=along)
        flat = graph.add_node(model, "GatherElements", [table, rows], f"{name}_flat", before=before, attributes=along)
        shape = graph.add_constant(model, f"{name}_shape", np.asarray(self.shape, np.int64))
        return graph.add_node(model, "Reshape", [flat, shape], name, before=before)


def book_of(codes: Codes, grid: WeightGrid) -> Book | None:
    """The codes of a weight as indices; None where they are not those of the grid's codebooks, or have no such form."""
    if len(grid.values) == 1:
        found = _indices(codes, grid.values[0])
        return None if found is None else Book(found, _turned(grid.values)[0], None, codes.shape)
    if not grid.values or grid.axis is None or (grid.axis != 0 and (grid.axis, codes.ndim) != (1, 2)):
        return None
    size = max(map(len, grid.values))
    rows = np.moveaxis(codes, grid.axis, 0).reshape(len(grid.values), -1)
    indices = [_indices(row, book, size) for row, book in zip(rows, grid.values, strict=True)]
    whole = [row for row in indices if row is not None]
    if len(whole) < len(indices):
        return None
    index, table = np.stack(whole), _turned(grid.values)
    if grid.axis == 0:
        return Book(index, table, 1, codes.shape)
    return Book(np.ascontiguousarray(index.T), np.ascontiguousarray(table.T), 0, codes.shape)


def _indices(codes: Codes, book: tuple[int, ...], size: int = 0) -> Codes | None:
    """Where the codes stand in an ascending codebook, from -(size // 2) on; None where one is not in it."""
    values = np.asarray(book, np.int8)
    places = np.minimum(np.searchsorted(values, codes), len(values) - 1)
    if not np.array_equal(values[places], codes):
        return None
    found: Codes = (places - (size or len(book)) // 2).astype(np.int8)
    return found


def _turned(books: tuple[tuple[int, ...], ...]) -> Codes:
    """int8 [books, size], each filled up with its last code and beginning in its middle."""
    size = max(map(len, books))
    whole = np.asarray([(*book, *book[-1:] * (size - len(book))) for book in books], np.int8)
    return np.roll(whole, -(size // 2), axis=1)
