"""From chunks of any length to the batches that the model takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from onnxq.calibrate.data.arrays import MAX_BYTES
from onnxq.calibrate.data.chunks import Chunk
from onnxq.calibrate.data.notes import Notes
from onnxq.errors import DataError
from onnxq.types import Feeds


@dataclass(frozen=True)
class Batching:
    """How rows become batches.

    Attributes:
        exact: The model's fixed first axis: every batch has exactly so many rows. None where it is dynamic.
        stack: Most single samples in a batch of a model with a dynamic first axis.
        one_shape: Samples of another shape are a mistake, not a reason to start another batch.
    """

    exact: int | None
    stack: int
    one_shape: bool = False


def first_rows(chunks: Iterable[Chunk], limit: int | None) -> Iterator[Chunk]:
    """Yield chunks until `limit` rows came; nothing behind them is read."""
    left = limit
    for chunk in chunks:
        if left is None or chunk.rows < left:
            yield chunk
            left = None if left is None else left - chunk.rows
        else:
            yield chunk if chunk.rows == left else chunk.head(left)
            return


def batches(chunks: Iterable[Chunk], how: Batching, notes: Notes) -> Iterator[Feeds]:
    """Yield batches of the chunks' rows in their order."""
    return _stacked(chunks, how) if how.exact is None else _exact(chunks, how, how.exact, notes)


def _stacked(chunks: Iterable[Chunk], how: Batching) -> Iterator[Feeds]:
    """Stack neighbouring single samples of one shape; leave stored batches as they are."""
    waiting: list[Chunk] = []
    for chunk in chunks:
        if waiting and not (chunk.single and _same_shape(waiting[0], chunk, how)):
            yield _join(waiting)
            waiting = []
        if not chunk.single:
            yield chunk.feeds
            continue
        waiting.append(chunk)
        if len(waiting) == how.stack:
            yield _join(waiting)
            waiting = []
    if waiting:
        yield _join(waiting)


def _exact(chunks: Iterable[Chunk], how: Batching, size: int, notes: Notes) -> Iterator[Feeds]:
    """Regroup rows into batches of exactly `size`; rows that do not fill one are dropped and counted."""
    waiting: list[Chunk] = []
    count = dropped = full = 0
    for chunk in chunks:
        if waiting and not _same_shape(waiting[0], chunk, how):
            dropped += count
            waiting, count = [], 0
        waiting.append(chunk)
        count += chunk.rows
        if count < size:
            continue
        joined = _join(waiting)
        for start in range(0, count - size + 1, size):
            full += 1
            yield {name: array[start : start + size] for name, array in joined.items()}
        left = count % size
        rest = {name: array[count - left :] for name, array in joined.items()}
        waiting, count = ([Chunk(rest, left, chunk.single, chunk.origin)] if left else []), left
    if count and not full:
        _require_room(waiting[0], size)
        notes.put("repeated", f"the last row, {size - count} times, to fill the model's batch of {size}")
        yield _filled(_join(waiting), size - count)
    elif count:
        dropped += count
    if dropped:
        notes.put("dropped", f"rows that do not fill the model's batch of {size}: {dropped}")


def _require_room(chunk: Chunk, size: int) -> None:
    """Refuse to fill a batch that no array of a file may be as large as."""
    needed = size * sum(array[:1].nbytes for array in chunk.feeds.values())
    if needed > MAX_BYTES:
        raise DataError(f"{chunk.origin}: the model's batch of {size} rows takes {needed / 2**30:.3g} GiB: too much")


def _same_shape(one: Chunk, other: Chunk, how: Batching) -> bool:
    if one.trailing == other.trailing:
        return True
    if how.one_shape:
        name, shape = next(iter(one.trailing.items()))
        raise DataError(
            f"{other.origin}: {list(other.trailing[name])} does not stack with {list(shape)} of "
            f"{one.origin}: give a size to resize to, or a batch of 1"
        )
    return False


def _join(chunks: list[Chunk]) -> Feeds:
    if len(chunks) == 1:
        return chunks[0].feeds
    return {name: np.concatenate([chunk.feeds[name] for chunk in chunks]) for name in chunks[0].feeds}


def _filled(feeds: Feeds, missing: int) -> Feeds:
    return {name: np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) for name, array in feeds.items()}
