"""Calibration: run the float model in onnxruntime and watch its tensors.

One pass, one histogram per tensor. Rows are fed in pieces so small that the tensors of one piece stay within a
memory budget; nothing is kept between pieces, so memory does not grow with the number of samples.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from onnxq import graph
from onnxq.calibrate.histogram import Histogram
from onnxq.errors import DataError
from onnxq.graph import Model
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Dataset, Feeds, Observations

PIECE_BYTES = 192 * 2**20
"""Budget for the observed tensors of one piece."""
MAX_PIECE_ROWS = 32


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
    inner = [name for name in tensors if name not in {str(value.name) for value in model.graph.inputs}]
    session = Session(graph.with_outputs(model, inner, keep=False) if inner else model, config)
    seen = {name: Histogram(name, zlib.crc32(name.encode()) ^ seed) for name in tensors}
    batched = has_free_rows(session)
    rows, first_rows, piece = 0, 0, MAX_PIECE_ROWS
    shapes: dict[str, tuple[int, ...]] = {}
    for batch in dataset:
        for feeds in _pieces(batch, lambda: piece if rows else 1, batched):  # noqa: B023 - meant to change
            found = session.run(feeds, inner) if inner else {}
            count = len(next(iter(feeds.values()))) if batched else 1
            for name, histogram in seen.items():
                histogram.add(np.asarray(found.get(name, feeds.get(name)), np.float32), rows=True)
            if not rows:
                first_rows = count
                shapes = probe_shapes(model, feeds, shapes_of, config)
                piece = _rows_per_piece(found, count)
            rows += count
            if progress is not None:
                progress(rows)
    if not rows:
        raise DataError("the calibration data holds no rows.")
    return Observations({name: h.stats() for name, h in seen.items()}, shapes, rows, first_rows)


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


def _rows_per_piece(found: dict[str, np.ndarray], rows: int) -> int:
    per_row = sum(value.nbytes for value in found.values()) / max(rows, 1)
    return int(np.clip(PIECE_BYTES / max(per_row, 1.0), 1, MAX_PIECE_ROWS))


def _pieces(batch: Feeds, size: Callable[[], int], batched: bool) -> Iterator[Feeds]:
    """Cut a batch into pieces of `size()` rows, asked anew for each piece."""
    total = len(next(iter(batch.values()))) if batched else 0
    if not batched:
        yield batch
        return
    start = 0
    while start < total:
        rows = size()
        yield {name: value[start : start + rows] for name, value in batch.items()}
        start += rows
