"""The datasets that the other stages iterate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from onnxq.calibrate.data.batching import Batching, batches, first_rows
from onnxq.calibrate.data.chunks import LABELS, Source
from onnxq.calibrate.data.notes import Notes
from onnxq.errors import DataError
from onnxq.types import Array, Dataset, Feeds


@dataclass(frozen=True, eq=False)
class Rows:
    """A source's rows in batches that the model takes; one batch is held at a time.

    Attributes:
        source: Where rows come from.
        name: What the user called it.
        batching: How rows become batches.
        samples: Most rows.
        facts: Its part of the provenance that is known from the start.
        notes: What came up while reading.
    """

    source: Source
    name: str
    batching: Batching
    samples: int | None
    facts: Mapping[str, object]
    notes: Notes

    @property
    def provenance(self) -> Mapping[str, object]:
        """Where the rows came from and what was done to them."""
        return {**self.source.about, "name": self.name, **self.facts, "notes": self.notes.as_dict()}

    def batches(self) -> Iterator[Feeds]:
        """Yield batches; labels, where there are any, are among the feeds."""
        empty = True
        for feeds in batches(first_rows(self.source, self.samples), self.batching, self.notes):
            empty = False
            yield feeds
        if empty:
            raise DataError(
                f"{self.name} gave no rows: give at least one, and again every time it is read "
                "(a list, or a function that makes them anew)"
            )

    def __iter__(self) -> Iterator[Feeds]:
        for feeds in self.batches():
            feeds.pop(LABELS, None)
            yield feeds


@dataclass(frozen=True, eq=False)
class LabelledDataset:
    """Batches of model inputs with their labels, int64, one per row."""

    rows: Rows

    @property
    def provenance(self) -> Mapping[str, object]:
        """Where the rows came from and what was done to them."""
        return self.rows.provenance

    def unlabelled(self) -> Dataset:
        """Return the same batches without the labels."""
        return self.rows

    def __iter__(self) -> Iterator[tuple[Feeds, Array]]:
        for feeds in self.rows.batches():
            labels = feeds.pop(LABELS)
            yield feeds, labels
