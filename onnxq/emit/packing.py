"""Weight codes of few bits, packed into bytes that the runtime unpacks once, when it creates a session.

    bytes [n] uint8 -> Cast(int32) -> Gather(table [256, k]) -> Reshape -> int8 codes, as if they were stored

A byte holds k codes as its digits in base b, the first one lowest: byte = sum_i digit_i * b^i; row `byte` of the table
lists what its digits stand for. 2 and 4 bits are b = 4 and 16. The codes -1, 0, 1 of a symmetric 2-bit grid are five
digits in base 3, 1.6 bits each. 3, 5 and 6 bits are the sum of two planes of their own bytes and tables:

    code = (upper digit * f - 2^(bits - 1)) + lower digit,        lower digit in 0 .. f - 1

Where a channel's codes begin somewhere else, they are stored as their distance from the middle of their range, and an
Add puts it back. Weights that have codebooks are stored as indices into these (`books`), from 1 bit on.

All of these nodes read constants, so onnxruntime folds them and fuses the int8 codes into the same integer kernels. The
operators exist from opset 13 on (the sum of int8 planes from 14 on): the file needs no newer runtime. Where the model's
opset has INT4 (21), 4-bit codes are such a tensor behind a Cast, which unpacks faster and in less memory. 7 and 8 bits
stay int8, and so does a weight whose packing would take more bytes for nodes and tables than it saves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.emit.books import NODES, Book
from onnxq.graph import Model, Node, Value

Codes = npt.NDArray[np.int8]

INT4_OPSET = 21
SUM_OPSET = 14
"""Add takes int8 from here on."""
NODE_BYTES = 64
"""A node or an initializer in the file, with short names; rather too many."""
COMPACT_NODE_BYTES = 40
"""The same, about as many as it is."""


@dataclass(frozen=True)
class Plane:
    """One digit of every code.

    Attributes:
        base: Of the digits.
        count: Digits in a byte: base ** count <= 256.
        factor: What a step of the digit adds to the code.
    """

    base: int
    count: int
    factor: int = 1

    def pack(self, offsets: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The plane of codes counted from their lowest one, [n] uint8 with n a multiple of `count`; [n / count]."""
        digits = (offsets // self.factor % self.base).reshape(-1, self.count)
        packed: npt.NDArray[np.uint8] = digits @ self._places().astype(np.uint8)
        return packed

    def table(self, lowest: int) -> npt.NDArray[np.int8]:
        """What the digits of each byte add, starting from the code `lowest`; int8 [base ** count, count]."""
        digits = np.arange(self.base**self.count)[:, None] // self._places() % self.base
        return (digits * self.factor + lowest).astype(np.int8)

    def _places(self) -> npt.NDArray[np.int64]:
        return self.base ** np.arange(self.count)


@dataclass(frozen=True)
class Form:
    """How codes of one width are stored.

    Attributes:
        lowest: Lowest code.
        highest: Highest code.
        planes: Their digits, the upper one first.
    """

    lowest: int
    highest: int
    planes: tuple[Plane, ...]

    @property
    def group(self) -> int:
        """Codes that fill whole bytes of every plane."""
        return max(plane.count for plane in self.planes)

    def nbytes(self, count: int) -> int:
        """Bytes of `count` codes."""
        groups = -(-count // self.group)
        return sum(groups * self.group // plane.count for plane in self.planes)


FORMS = (
    Form(-1, 0, (Plane(2, 8),)),
    Form(-1, 1, (Plane(3, 5),)),
    Form(-2, 1, (Plane(4, 4),)),
    Form(-4, 3, (Plane(4, 4, 2), Plane(2, 8))),
    Form(-8, 7, (Plane(16, 2),)),
    Form(-16, 15, (Plane(16, 2, 2), Plane(2, 8))),
    Form(-32, 31, (Plane(16, 2, 4), Plane(4, 4))),
)
"""The narrowest first."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of a grid of 2 to 8 bits, without the nodes that unpack them."""
    index = _narrowest(np.asarray([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1]))
    return count if index == len(FORMS) else FORMS[index].nbytes(count)


def stored_bytes(count: int, bits: int, channels: int) -> int:
    """About the bytes of a weight in the file, with the nodes that unpack it and where its channels' codes begin.

    Args:
        count: Number of codes.
        bits: Of its grid, 2 to 8.
        channels: Number of its steps.
    """
    index = _narrowest(np.asarray([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1]))
    if index == len(FORMS):
        return count
    nodes = 2 * len(FORMS[index].planes) + 3
    return min(count, packed_bytes(count, bits) + COMPACT_NODE_BYTES * nodes + channels)


def _narrowest(codes: npt.NDArray[np.signedinteger]) -> int:
    """Index of the first form that takes all `codes`; one behind the last where none does."""
    low, high = codes.min(), codes.max()
    fits = (index for index, form in enumerate(FORMS) if form.lowest <= low and high <= form.highest)
    return next(fits, len(FORMS))


class Packer:
    """Stores weight codes in a model that is being emitted; weights of the same form share its tables.

    Args:
        model: Edited in place.
        codes: All weights to come, int8 of any shape, by the names that the stored codes shall have.
        middles: What is subtracted from the codes of some of them before they are stored, to be broadcast against them.
        books: Some of the others as indices.
    """

    def __init__(
        self,
        model: Model,
        codes: Mapping[str, Codes],
        middles: Mapping[str, npt.NDArray[np.int32]],
        books: Mapping[str, Book] = {},
    ) -> None:
        self._model = model
        self._books = books
        codes = {name: books[name].index if name in books else array for name, array in codes.items()}
        self._shared: dict[tuple[Any, ...], Value] = {}
        self._native = graph.opset(model) >= INT4_OPSET
        self._middles = {
            name: middle.astype(np.int8)
            for name, middle in middles.items()
            if _narrowest(codes[name] - middle) < _narrowest(codes[name])
        }
        moved = {name: (array - self._middles.get(name, 0)).astype(np.int8) for name, array in codes.items()}
        self._forms = self._smallest(moved, FORMS)
        sums = any(len(form.planes) > 1 or name in self._middles for name, form in self._forms.items())
        if sums and not graph.raise_opset(model, SUM_OPSET):
            self._middles = {}
            self._forms = self._smallest(codes, [form for form in FORMS if len(form.planes) == 1])

    def store(self, name: str, codes: Codes, before: Node) -> Value:
        """Add one of the weights, packed where that saves bytes.

        Args:
            name: The name it was announced with, which folding gives to the int8 codes.
            codes: The codes.
            before: The nodes that unpack the codes are put in front of this one.

        Returns:
            The int8 codes: an initializer, or the output of the last node.
        """
        form, middle, book = self._forms.get(name), self._middles.get(name), self._books.get(name)
        if form is None:
            return graph.add_constant(self._model, name, codes)
        if book is not None:
            index = self._unpacked(f"{name}_index", form, book.index, before)
            return book.look_up(self._model, name, index, before)
        if middle is None:
            return self._unpacked(name, form, codes, before)
        moved = self._unpacked(f"{name}_moved", form, codes - middle, before)
        back = graph.add_constant(self._model, f"{name}_middle", middle)
        return graph.add_node(self._model, "Add", [moved, back], name, before=before)

    def _unpacked(self, name: str, form: Form, codes: Codes, before: Node) -> Value:
        """Store the codes and add the nodes that unpack them."""
        if self._cast(form):
            stored = graph.add_packed(self._model, f"{name}_packed", codes)
            return graph.add_node(self._model, "Cast", [stored], name, before=before, attributes={"to": graph.INT8})
        planes = self._planes(name, form, codes, before)
        if len(planes) > 1:
            planes = [graph.add_node(self._model, "Add", planes, f"{name}_sum", before=before)]
        return self._shaped(name, planes[0], codes, form, before)

    def zeros(self, shape: tuple[int, ...]) -> Value:
        """int8 zeros, the zero points of weights."""
        return self._constant(("zeros", shape), "packing.zeros", np.zeros(shape, np.int8))

    def _smallest(self, codes: Mapping[str, Codes], forms: Sequence[Form]) -> dict[str, Form]:
        """The forms of the weights that make the file smallest, tables included; int8 weights have none."""
        fitting = {
            name: [form for form in forms if form.lowest <= array.min() and array.max() <= form.highest]
            for name, array in codes.items()
        }
        saved = {
            (name, form): codes[name].nbytes - form.nbytes(codes[name].size) - self._nodes(name, codes[name].size, form)
            for name, fits in fitting.items()
            for form in fits
        }
        best, most = dict[str, Form](), 0
        for number in range(1, 2 ** len(forms)):
            used = {form for index, form in enumerate(forms) if number >> index & 1}
            chosen: dict[str, Form] = {}
            total = -sum(self._tables(form) for form in used)
            for name, fits in fitting.items():
                form = max((form for form in fits if form in used), key=lambda form: saved[name, form], default=None)
                if form is not None and saved[name, form] > 0:
                    chosen[name] = form
                    total += saved[name, form]
            if total > most:
                best, most = chosen, total
        return best

    def _cast(self, form: Form) -> bool:
        """Whether an INT4 tensor and a Cast do what the form's table does."""
        return self._native and form.highest == 7

    def _nodes(self, name: str, size: int, form: Form) -> int:
        """Bytes of the nodes that unpack a weight of `size` codes."""
        count = 2 * len(form.planes) + (len(form.planes) > 1) + (3 if size % form.group else 1)
        middle, book = self._middles.get(name), self._books.get(name)
        more = 0 if middle is None else 2 * NODE_BYTES + middle.size
        more += 0 if book is None else (NODES + 1) * NODE_BYTES + book.table.size
        return NODE_BYTES * (1 if self._cast(form) else count) + more

    def _tables(self, form: Form) -> int:
        """Bytes of the form's tables."""
        return (
            0 if self._cast(form) else sum(NODE_BYTES + plane.base**plane.count * plane.count for plane in form.planes)
        )

    def _planes(self, name: str, form: Form, codes: Codes, before: Node) -> list[Value]:
        """The planes' contributions, each of shape [groups, ..., codes of an upper byte]."""
        offsets = (codes.reshape(-1).astype(np.int16) - form.lowest).astype(np.uint8)
        offsets = np.pad(offsets, (0, -offsets.size % form.group))
        found = []
        for index, plane in enumerate(form.planes):
            part = name if len(form.planes) == 1 else f"{name}_{'upper' if index == 0 else 'lower'}"
            packed = plane.pack(offsets)
            if plane.count < form.group:
                packed = packed.reshape(-1, form.group // plane.count)
            stored = graph.add_constant(self._model, f"{part}_packed", packed)
            rows = graph.add_node(
                self._model, "Cast", [stored], f"{part}_rows", before=before, attributes={"to": graph.INT32}
            )
            table = self._table(form, plane)
            found.append(graph.add_node(self._model, "Gather", [table, rows], f"{part}_codes", before=before))
        return found

    def _table(self, form: Form, plane: Plane) -> Value:
        upper = form.planes[0]
        table = plane.table(form.lowest if plane is upper else 0)
        if plane.count > upper.count:
            table = table.reshape(len(table), -1, upper.count)
        return self._constant(("table", form, plane), "packing.table", table)

    def _shaped(self, name: str, planes: Value, codes: Codes, form: Form, before: Node) -> Value:
        """The codes in the weight's shape, without those that filled the last byte up."""
        if codes.size % form.group:
            flat = graph.add_node(self._model, "Reshape", [planes, self._numbers(-1)], f"{name}_flat", before=before)
            ends = [self._numbers(0), self._numbers(codes.size)]
            planes = graph.add_node(self._model, "Slice", [flat, *ends], f"{name}_cut", before=before)
        return graph.add_node(self._model, "Reshape", [planes, self._numbers(*codes.shape)], name, before=before)

    def _numbers(self, *values: int) -> Value:
        return self._constant(("numbers", values), "packing.numbers", np.asarray(values, np.int64))

    def _constant(self, key: tuple[Any, ...], name: str, array: npt.NDArray[Any]) -> Value:
        """An initializer that weights share."""
        if key not in self._shared:
            self._shared[key] = graph.add_constant(self._model, name, array)
        return self._shared[key]
