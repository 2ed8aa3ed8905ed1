"""Where rows come from: files on disk, arrays in memory, feeds that a program makes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from onnxq.calibrate.data.arrays import Memory, Named, open_arrays
from onnxq.calibrate.data.chunks import LABELS, Chunk
from onnxq.calibrate.data.files import DataFile
from onnxq.calibrate.data.fit import Fit, as_array
from onnxq.calibrate.data.notes import Notes
from onnxq.calibrate.data.pictures import PicturePlan
from onnxq.errors import DataError


@dataclass(frozen=True, eq=False)
class Pictures:
    """Image files, one row each, decoded when their turn comes."""

    files: tuple[DataFile, ...]
    plan: PicturePlan
    labelled: bool
    notes: Notes

    @property
    def about(self) -> dict[str, object]:
        """Its part of the provenance."""
        return {"kind": "images", **self.plan.describe()}

    def check(self) -> None:
        """Decode the first picture."""
        self.plan.read(self.files[0], self.notes)

    def __iter__(self) -> Iterator[Chunk]:
        for file in self.files:
            values = self.plan.read(file, self.notes)
            feeds = {self.plan.spec.name: values[None] if self.plan.batched else values}
            if self.labelled:
                feeds[LABELS] = np.array([file.label], np.int64)
            yield Chunk(feeds, 1, self.plan.batched, file.shown)


@dataclass(frozen=True, eq=False)
class ArrayFiles:
    """`.npz` and `.npy` files, opened one after the other."""

    files: tuple[DataFile, ...]
    fit: Fit

    @property
    def about(self) -> dict[str, object]:
        """Its part of the provenance."""
        return {"kind": "arrays"}

    def check(self) -> None:
        """Look at the first file's headers."""
        first = self.files[0]
        with open_arrays(first.path, first.shown) as arrays:
            self.fit.check(arrays, first.shown, first.label)

    def __iter__(self) -> Iterator[Chunk]:
        for file in self.files:
            with open_arrays(file.path, file.shown) as arrays:
                yield from self.fit.chunks(arrays, file.shown, file.label)


@dataclass(frozen=True, eq=False)
class InMemory:
    """Arrays in memory, as if they were one file."""

    arrays: Named
    fit: Fit

    @property
    def about(self) -> dict[str, object]:
        """Its part of the provenance."""
        return {"kind": "memory"}

    def check(self) -> None:
        """Look at the shapes and types."""
        self.fit.check(self.arrays, "the arrays")

    def __iter__(self) -> Iterator[Chunk]:
        yield from self.fit.chunks(self.arrays, "the arrays")


@dataclass(frozen=True, eq=False)
class Program:
    """Feeds that a function makes anew for every pass.

    Attributes:
        make: Returns an iterable of feeds (or of arrays for a model with one input).
        name: How messages and the provenance call it.
        fit: What each of them must look like.
        facts: More about it, for the provenance.
    """

    make: Callable[[], Iterable[object]]
    name: str
    fit: Fit
    facts: Mapping[str, object]

    @property
    def about(self) -> dict[str, object]:
        """Its part of the provenance."""
        return dict(self.facts)

    def check(self) -> None:
        """Nothing: making feeds may be slow or run once only for each pass."""

    def __iter__(self) -> Iterator[Chunk]:
        for index, item in enumerate(self._items()):
            where = f"{self.name}, item {index}"
            yield from self.fit.chunks(self._named(item, where), where)

    def _items(self) -> Iterator[object]:
        """Run the user's code; what it raises becomes one line that names it."""
        try:
            iterator = iter(self.make())
            while True:
                try:
                    item = next(iterator)
                except StopIteration:
                    return
                yield item
        except DataError:
            raise
        except (Exception, SystemExit) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise DataError(f"{self.name} failed ({reason}): it must return an iterable of dicts of arrays") from error

    def _named(self, item: object, where: str) -> Memory:
        if isinstance(item, Mapping):
            return Memory({str(key): as_array(value, f"{where}, {key!r}") for key, value in item.items()})
        if len(self.fit.inputs) == 1:
            return Memory({self.fit.inputs[0].name: as_array(item, where, numbers=False)})
        raise DataError(f"{where} is of type {type(item).__name__}: give a dict of arrays by input name")
