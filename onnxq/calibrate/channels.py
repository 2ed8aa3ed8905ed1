"""Statistics per channel of chosen tensors, and a sample of their rows.

What is kept of a tensor does not grow with the data: the extremes of each channel, and a bounded number of rows drawn
evenly from all that went by (a row is one vector of channels: a token, a pixel).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.calibrate.observe import Pieces, count_rows, has_free_rows
from onnxq.errors import DataError
from onnxq.graph import Model
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Feeds

Vector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ChannelRange:
    """What was seen of one tensor, channel by channel.

    Attributes:
        low: Smallest value per channel, [channels].
        high: Largest value per channel, [channels].
        sample: Rows drawn without replacement, [at most `keep`, channels].
        count: Rows seen.
        finite: False when an infinity or NaN was seen; rows with one are left out of everything above.
    """

    low: Vector
    high: Vector
    sample: npt.NDArray[np.float32]
    count: int
    finite: bool


def channel_ranges(
    model: Model,
    batches: Iterable[Feeds],
    tensors: Mapping[str, int],
    *,
    keep: int = 1024,
    config: SessionConfig = SessionConfig(stop_spinning=True),
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, ChannelRange]:
    """Ranges per channel of `tensors` over `batches`.

    Args:
        model: The float model.
        batches: Calibration feeds.
        tensors: Name of a float tensor -> its channel axis (negative counts from the last); graph inputs are allowed.
        keep: Most rows to keep of each tensor.
        config: How to run.
        seed: Of the sample.
        progress: Called with the number of input rows done so far.

    Raises:
        DataError: There are no rows, or they do not fit the model.
    """
    session, inner = _session(model, tensors, config)
    pieces = Pieces(has_free_rows(session))
    watches = {name: _Watch(keep, zlib.crc32(name.encode()) ^ seed) for name in tensors}
    done = 0
    for feeds in pieces.of(batches):
        found = session.run({spec.name: feeds[spec.name] for spec in session.inputs}, inner) if inner else {}
        pieces.learn(found, feeds)
        for name, axis in tensors.items():
            watches[name].add(np.asarray(found.get(name, feeds.get(name)), np.float32), axis)
        done += count_rows(feeds)
        if progress is not None:
            progress(done)
    if not done:
        raise DataError("the calibration data holds no rows.")
    return {name: watch.result() for name, watch in watches.items()}


def _session(model: Model, tensors: Mapping[str, int], config: SessionConfig) -> tuple[Session, list[str]]:
    """A session that computes the tensors that are not fed, and their names."""
    fed = {spec[0] for spec in graph.input_specs(model)}
    inner = [name for name in tensors if name not in fed]
    return Session(graph.with_outputs(model, inner, keep=False) if inner else model, config), inner


class _Watch:
    """Extremes of each channel, and the rows with the smallest random keys: an even draw from all rows."""

    def __init__(self, keep: int, seed: int) -> None:
        self._keep = keep
        self._random = np.random.default_rng(seed)
        self._keys = np.zeros(0)
        self._rows = np.zeros((0, 0), np.float32)
        self._low = self._high = np.zeros(0, np.float32)
        self._count = 0
        self._finite = True

    def add(self, values: npt.NDArray[np.float32], axis: int) -> None:
        """Take in an array with its channels along `axis`."""
        rows = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
        sound = np.isfinite(rows).all(1)
        if not sound.all():
            self._finite = False
            rows = rows[sound]
        if not self._count:
            self._rows = np.zeros((0, values.shape[axis]), np.float32)
            self._low = np.full(values.shape[axis], np.inf, np.float32)
            self._high = -self._low
        self._count += len(rows)
        if not len(rows):
            return
        self._low = np.minimum(self._low, rows.min(0))
        self._high = np.maximum(self._high, rows.max(0))
        keys = self._random.random(len(rows))
        first = np.argsort(keys, kind="stable")[: self._keep]
        keys, rows = np.concatenate([self._keys, keys[first]]), np.concatenate([self._rows, rows[first]])
        first = np.argsort(keys, kind="stable")[: self._keep]
        self._keys, self._rows = keys[first], rows[first]

    def result(self) -> ChannelRange:
        """What was seen; all-zero ranges where no sound row was."""
        if not self._count:
            zeros = np.zeros(self._rows.shape[1], np.float32)
            return ChannelRange(zeros, zeros, self._rows, 0, self._finite)
        return ChannelRange(self._low, self._high, self._rows, self._count, self._finite)
