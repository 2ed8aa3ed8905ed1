"""Two disjoint parts of a dataset: rows to calibrate with, and rows held out to judge the result."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxq.calibrate.observe import count_rows
from onnxq.errors import UsageError
from onnxq.types import Dataset, Feeds

Unit = Literal["row", "batch"]


@dataclass(frozen=True, eq=False)
class Part:
    """One side of a split; reads the whole dataset and passes on what is its own.

    Attributes:
        dataset: What was split.
        every: The last of every so many units is held out.
        unit: Rows, or whole batches for a model whose batches cannot be cut.
        held_out: Which side this is.
        overlap: There are too few units: both sides have all of them.
    """

    dataset: Dataset
    every: int
    unit: Unit
    held_out: bool
    overlap: bool

    @property
    def provenance(self) -> Mapping[str, object]:
        """The dataset's, and which part of it this is."""
        part = "held out" if self.held_out else "calibration"
        split = {"part": part, "every": self.every, "unit": self.unit}
        return {**self.dataset.provenance, "split": split, "overlap": self.overlap}

    def __iter__(self) -> Iterator[Feeds]:
        first = 0
        for feeds in self.dataset:
            units = _units(feeds, self.unit)
            position = np.arange(first, first + units) % self.every
            first += units
            mine = (position == self.every - 1) == self.held_out
            if self.overlap or mine.all():
                yield feeds
            elif mine.any():
                yield {name: array[mine] for name, array in feeds.items()}


def split(dataset: Dataset, every: int = 8, *, unit: Unit | None = None) -> tuple[Dataset, Dataset]:
    """Split into calibration and held-out rows: row i is held out if i % every == every - 1.

    With fewer than `every` rows nothing would be held out. Both parts then have all rows, and `overlap` is
    true in their provenance.

    Args:
        dataset: Any dataset; it is read up to its `every`-th row.
        every: At least 2.
        unit: "batch" keeps batches whole, as a model with a fixed first axis needs; None asks the dataset.
    """
    if every < 2:
        raise UsageError(f"a split needs every of at least 2, not {every}")
    chosen: Unit = unit or ("batch" if dataset.provenance.get("unit") == "batch" else "row")
    overlap = not _has(dataset, every, chosen)
    return Part(dataset, every, chosen, False, overlap), Part(dataset, every, chosen, True, overlap)


def _has(dataset: Dataset, least: int, unit: Unit) -> bool:
    """Tell whether there are so many units, reading no further than that."""
    count = 0
    for feeds in dataset:
        count += _units(feeds, unit)
        if count >= least:
            return True
    return False


def _units(feeds: Feeds, unit: Unit) -> int:
    return 1 if unit == "batch" else count_rows(feeds)
