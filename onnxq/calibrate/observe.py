"""Calibration: run the float model in onnxruntime and watch its tensors.

One pass, one histogram per tensor. Rows are fed in pieces so small that the tensors of one piece stay within a
memory budget; nothing is kept between pieces, so memory does not grow with the number of samples.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from onnxq import graph
from onnxq.calibrate.histogram import Histogram
from onnxq.errors import DataError
from onnxq.graph import Model
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Dataset, Feeds, Observations

PIECE_BYTES = 64 * 2**20
"""Budget for the observed tensors of one piece."""
MAX_PIECE_ROWS = 32
WORKERS = 2
"""Threads that fill histograms; each tensor's is filled by one at a time, so the result does not depend on it."""


def observe(
    model: Model,
    dataset: Dataset,
    tensors: Sequence[str],
    shapes_of: Sequence[str] = (),
    *,
    config: SessionConfig = SessionConfig(stop_spinning=True),
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Observations:
    """Statistics of `tensors` over `dataset`.

    Args:
        model: The prepared float model.
        dataset: Calibration rows.
        tensors: Names of float tensors to watch; graph inputs are allowed.
        shapes_of: Names of tensors of which only the shape in the first piece is wanted.
        config: How to run.
        seed: For thinning large tensors.
        progress: Called with the number of rows done so far.

    Raises:
        DataError: There are no rows, or they do not fit the model.
    """
    fed = {spec[0] for spec in graph.input_specs(model)}
    inner = [name for name in tensors if name not in fed]
    session = Session(graph.with_outputs(model, inner, keep=False) if inner else model, config)
    seen = {name: Histogram(name, zlib.crc32(name.encode()) ^ seed) for name in tensors}
    pieces = Pieces(has_free_rows(session))
    rows, first = 0, None
    with ThreadPoolExecutor(WORKERS) as pool:
        for feeds in pieces.of(dataset):
            found = session.run(feeds, inner) if inner else {}
            values = [np.asarray(found[name] if name in found else feeds[name], np.float32) for name in seen]
            list(pool.map(Histogram.add, seen.values(), values))
            pieces.learn(found, feeds)
            first = feeds if first is None else first
            rows += count_rows(feeds)
            if progress is not None:
                progress(rows)
    if first is None:
        raise DataError("the calibration data holds no rows.")
    del session  # it holds a copy of the weights, and so will the next
    shapes = probe_shapes(model, first, shapes_of, config)
    return Observations({name: h.stats() for name, h in seen.items()}, shapes, rows, count_rows(first))


def count_rows(feeds: Feeds) -> int:
    """The common length of all first axes; 1 where there is none, as a model without a row axis has it."""
    sizes = {np.shape(value)[:1] for value in feeds.values()}
    first = sizes.pop()
    return first[0] if first and not sizes else 1


def has_free_rows(session: Session) -> bool:
    """Whether every input's first axis is free, so that batches may be cut into pieces."""
    return all(spec.shape and not isinstance(spec.shape[0], int) for spec in session.inputs)


def probe_shapes(
    model: Model,
    feeds: Feeds,
    names: Sequence[str],
    config: SessionConfig = SessionConfig(stop_spinning=True),
) -> dict[str, tuple[int, ...]]:
    """Run-time shapes of the values called `names` for `feeds`."""
    if not names:
        return {}
    given = {name: tuple(np.shape(feeds[name])) for name in names if name in feeds}
    inner = [name for name in names if name not in given]
    session = Session(graph.with_outputs(model, inner, keep=False), config)
    found = session.run({spec.name: feeds[spec.name] for spec in session.inputs}, inner)
    return given | {name: tuple(np.shape(value)) for name, value in found.items()}


class Pieces:
    """Cuts batches so that the tensors of one piece keep within the budget.

    How much a row takes is learned from the pieces themselves, beginning with a single row of every new shape.
    """

    def __init__(self, cut: bool) -> None:
        self._cut = cut
        self._rows = 1
        self._shapes: dict[str, tuple[int, ...]] = {}

    def of(self, batches: Iterable[Feeds]) -> Iterator[Feeds]:
        """All batches in order, whole where they must not be cut."""
        for batch in batches:
            if not self._cut or len({len(value) for value in batch.values()}) != 1:
                yield batch
                continue
            shapes = {name: value.shape[1:] for name, value in batch.items()}
            if shapes != self._shapes:
                self._shapes, self._rows = shapes, 1
            start = 0
            while start < count_rows(batch):
                stop = start + self._rows
                yield {name: value[start:stop] for name, value in batch.items()}
                start = stop

    def learn(self, found: Feeds, feeds: Feeds) -> None:
        """Take note of what a piece took."""
        per_row = sum(value.nbytes for value in found.values()) / max(count_rows(feeds), 1)
        self._rows = int(np.clip(PIECE_BYTES / max(per_row, 1.0), 1, MAX_PIECE_ROWS))
