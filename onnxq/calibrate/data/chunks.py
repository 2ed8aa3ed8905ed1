"""Rows as they come from a source, before they are batched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from onnxq.types import Feeds, InputSpec

LABELS = "\0labels"
"""Key under which labels travel among the feeds; no model input can have this name."""


@dataclass(frozen=True, eq=False)
class Chunk:
    """Some consecutive rows.

    Attributes:
        feeds: Arrays with the rows on axis 0, or one whole feed of a model that has no row axis.
        rows: Number of rows; 1 for a whole feed.
        single: A lone sample, which may be stacked with its neighbours; otherwise a batch, kept as stored.
        origin: The file it came from, for messages.
    """

    feeds: Feeds
    rows: int
    single: bool
    origin: str

    def head(self, rows: int) -> Chunk:
        """Return the first rows."""
        return Chunk({k: v[:rows] for k, v in self.feeds.items()}, rows, self.single, self.origin)

    @property
    def trailing(self) -> dict[str, tuple[int, ...]]:
        """Shapes without the row axis: chunks that agree in them can be stacked."""
        return {name: array.shape[1:] for name, array in self.feeds.items()}


class Source(Protocol):
    """Rows that can be read any number of times."""

    @property
    def about(self) -> dict[str, object]:
        """Its part of the provenance."""
        ...

    def check(self) -> None:
        """Look at the first of it, so that data which cannot fit is refused before the work starts."""
        ...

    def __iter__(self) -> Iterator[Chunk]:
        """Yield one chunk at a time."""
        ...


def row_axis(inputs: tuple[InputSpec, ...]) -> bool:
    """Tell whether the first axes of all inputs count the same rows.

    They do when all are dynamic or all have the same fixed size. Otherwise a feed is a whole and not cut.
    """
    first = [spec.shape[0] if spec.shape else 0 for spec in inputs]
    sizes = {dim if isinstance(dim, int) else None for dim in first}
    return len(sizes) == 1 and 0 not in sizes
