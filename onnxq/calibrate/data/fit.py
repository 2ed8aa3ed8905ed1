"""Making named arrays fit the model's inputs, or saying in one line why they do not."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import permutations

import numpy as np

from onnxq.calibrate.data.arrays import Header, Named
from onnxq.calibrate.data.casting import castable, converted
from onnxq.calibrate.data.chunks import LABELS, Chunk
from onnxq.calibrate.data.notes import Notes
from onnxq.errors import DataError, NoLabels
from onnxq.types import Array, Feeds, InputSpec

LABEL_NAMES = ("label", "labels", "y", "target")
MOST_ROWS = 64
"""Rows taken at once from arrays that hold many."""


def example(inputs: Collection[InputSpec], where: str) -> str:
    """Return what to write, as Python: a line for a file, a dict for anything else."""
    shown = {spec.name: f"{spec.dtype}[{', '.join(_dim(dim) for dim in spec.shape)}]" for spec in inputs}
    if all(name.isidentifier() for name in shown):
        arrays = ", ".join(f"{name}={shape}" for name, shape in shown.items())
    else:
        arrays = "**{" + ", ".join(f"{name!r}: {shape}" for name, shape in shown.items()) + "}"
    if not where.endswith((".npz", ".npy")):
        return "{" + ", ".join(f"{name!r}: {shape}" for name, shape in shown.items()) + "}"
    return f"np.savez({where[:-1] + 'z'!r}, {arrays})"


@dataclass(frozen=True)
class _Cutting:
    """How arrays give rows: which array is which input, how many rows, whether they are a lone sample."""

    keys: dict[str, str]
    rows: int
    single: bool
    labels: str | None


@dataclass(frozen=True, eq=False)
class Fit:
    """What arrays must look like, and how they are cut.

    Attributes:
        inputs: The model's inputs.
        rowwise: The first axis of every input counts rows; otherwise a file is one feed and stays whole.
        step: Most rows of a chunk.
        labelled: Labels are wanted beside the inputs.
        notes: Receives casts and what was left out.
    """

    inputs: tuple[InputSpec, ...]
    rowwise: bool
    step: int
    labelled: bool
    notes: Notes

    def check(self, arrays: Named, where: str, label: int | None = None) -> _Cutting:
        """Look at the arrays' headers only."""
        keys = self._match(arrays.names, where)
        headers = {spec.name: arrays.header(keys[spec.name]) for spec in self.inputs}
        rows = self._rows(headers, where)
        labels = self._label_key(arrays.names, where, label)
        if labels is not None:
            _check_labels(arrays.header(labels), rows, where)
        single = self.rowwise and all(len(headers[spec.name].shape) < spec.rank for spec in self.inputs)
        return _Cutting(keys, rows, single, labels)

    def chunks(self, arrays: Named, where: str, label: int | None = None) -> Iterator[Chunk]:
        """Yield the arrays' rows; `label` is the class of all of them if no labels are among the arrays."""
        cutting = self.check(arrays, where, label)
        rows = cutting.rows
        loaded = {spec.name: arrays.load(cutting.keys[spec.name]) for spec in self.inputs}
        for spec in self.inputs:
            if loaded[spec.name].ndim < spec.rank:
                loaded[spec.name] = loaded[spec.name][None]
        if cutting.labels is not None:
            loaded[LABELS] = arrays.load(cutting.labels).reshape(rows)
        elif self.labelled:
            loaded[LABELS] = np.full(rows, label)
        step = self.step if self.rowwise else rows
        for start in range(0, rows, step):
            count = min(step, rows - start)
            yield Chunk(self._cut(loaded, start, count, where), count, cutting.single, where)

    def _cut(self, loaded: Feeds, start: int, count: int, where: str) -> Feeds:
        """Copy some rows, in the types that the model takes."""
        part = slice(start, start + count) if self.rowwise else ...
        feeds = {spec.name: converted(loaded[spec.name][part], spec, where, start, self.notes) for spec in self.inputs}
        if LABELS in loaded:
            feeds[LABELS] = np.array(loaded[LABELS][start : start + count], np.int64)
        return feeds

    def _match(self, names: Collection[str], where: str) -> dict[str, str]:
        """Find each input's array: by name, or the only one for the only input."""
        wanted = [spec.name for spec in self.inputs]
        missing = [name for name in wanted if name not in names]
        others = [name for name in names if name not in wanted and name not in LABEL_NAMES]
        if missing == wanted and len(wanted) == len(others) == 1:
            return {wanted[0]: others[0]}
        if missing:
            some = ", ".join(repr(name) for name in missing)
            found = ", ".join(list(names)[:8]) or "nothing"
            raise DataError(
                f"{where}: no array for input{'s' if len(missing) > 1 else ''} {some} (found {found}): "
                f"give {example(self.inputs, where)}"
            )
        for name in others:
            self.notes.add("ignored arrays", name)
        return {name: name for name in wanted}

    def _rows(self, headers: dict[str, Header], where: str) -> int:
        """Return how many rows the arrays have; a sample without a row axis is one."""
        rows: dict[str, int] = {}
        for spec in self.inputs:
            header = headers[spec.name]
            castable(header.dtype, spec, where)
            shape = header.shape
            if self.rowwise and len(shape) == spec.rank - 1:
                shape = (1, *shape)
            _check_shape(spec, shape, header, where, skip=int(self.rowwise))
            rows[spec.name] = shape[0] if self.rowwise else 1
        if len(set(rows.values())) > 1:
            counts = ", ".join(f"{name} {count}" for name, count in rows.items())
            raise DataError(f"{where}: the inputs differ in rows ({counts}): give every input the same number")
        count = next(iter(rows.values()))
        if count == 0:
            raise DataError(f"{where} has no rows: remove it or write it again")
        return count

    def _label_key(self, names: Collection[str], where: str, label: int | None) -> str | None:
        """Find the labels' array; None where none is wanted, or where `label` stands for it."""
        if not self.labelled:
            return None
        taken = {spec.name for spec in self.inputs}
        found = next((name for name in LABEL_NAMES if name in names and name not in taken), None)
        if found is None and label is None:
            raise NoLabels(
                f"{where} has no labels (found {', '.join(list(names)[:8])}): add integers under one of "
                f"{', '.join(LABEL_NAMES)}, or compare with a reference model instead"
            )
        return found


def _check_labels(header: Header, rows: int, where: str) -> None:
    if header.dtype.kind not in "iu" or math.prod(header.shape) != rows:
        raise DataError(f"{where}: the labels are {header}: give one integer per row, int64[{rows}]")


def _check_shape(spec: InputSpec, shape: tuple[int, ...], header: Header, where: str, skip: int) -> None:
    """Compare fixed sizes behind the first `skip` axes."""
    if len(shape) == spec.rank and _fits(spec.shape[skip:], shape[skip:]):
        return
    order = _reordered(spec, shape, skip)
    if order is None:
        advice = f"give {example([spec], where)}"
    else:
        added = len(shape) - len(header.shape)
        axes = ", ".join(str(axis - added) for axis in order[added:])
        advice = f"if only its axes are in another order, save array.transpose({axes})"
    raise DataError(f"{where}: {_takes(spec)}, the array is {header}: {advice}")


def _reordered(spec: InputSpec, shape: tuple[int, ...], skip: int) -> tuple[int, ...] | None:
    """Find an order of the axes in which the array would fit."""
    if not 3 <= len(shape) == spec.rank <= 5:
        return None
    orders = (order for order in permutations(range(skip, len(shape))))
    fitting = (order for order in orders if _fits(spec.shape[skip:], [shape[axis] for axis in order]))
    found = next(fitting, None)
    return None if found is None else (*range(skip), *found)


def _fits(dims: Collection[int | str | None], shape: Collection[int]) -> bool:
    return all(not isinstance(dim, int) or dim == size for dim, size in zip(dims, shape, strict=True))


def _takes(spec: InputSpec) -> str:
    return f"input {spec.name!r} takes {spec.dtype}[{', '.join(_dim(dim) for dim in spec.shape)}]"


def _dim(dim: int | str | None) -> str:
    return str(dim) if isinstance(dim, int) else "?"


def as_array(value: object, where: str, *, numbers: bool = True) -> Array:
    """Turn a tensor of any library into an array; numbers and lists of them too where `numbers` allows it."""
    if not (hasattr(value, "__array__") or (numbers and isinstance(value, int | float | list | tuple))):
        raise DataError(f"{where} is of type {type(value).__name__}: give an array, or a dict of arrays by input name")
    try:
        return np.asarray(value)
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{where} cannot be made an array ({error}): give arrays of numbers") from error
