"""Which channels and which samples hold extreme values.

Fused re-parameterized networks and transformers have values that are huge in few channels (always the same ones) or in
few samples; either stretches the range that all others have to share. A channel's magnitude is the median over samples
of its largest magnitude in each, so that a few samples do not make one of it; a sample's is its largest magnitude. Both
are compared as logarithms with those of the others,

    score = 0.6745 (log2 m - median) / max(MAD, 1/8)

which is a z-score that outliers do not move (MAD: median absolute deviation; Iglewicz and Hoaglin, 1993). What scores
high and is several times the median is an outlier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.calibrate.observe import count_rows, has_free_rows
from onnxq.errors import DataError
from onnxq.graph import Model
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Array, Feeds
from onnxq.types.outliers import Outlier, TensorOutliers

SCORE = 3.5
TIMES = 4.0
KEPT_SAMPLES = 128
"""Samples that the medians of the channels are taken over: the first ones."""
PIECE = 8
"""Samples run at a time, where batches may be cut."""
NARROW = 0.125
"""Least deviation that others are granted, in powers of 2: 9 %."""
TINY = 1e-12


def find_outliers(
    model: Model,
    batches: Iterable[Feeds],
    tensors: Mapping[str, int],
    *,
    config: SessionConfig = SessionConfig(stop_spinning=True),
    progress: Callable[[int], None] | None = None,
) -> dict[str, TensorOutliers]:
    """Outliers of `tensors` over `batches`.

    A tensor whose first axis is not that of the samples (its length is another than the inputs') counts as one sample
    per batch. Infinities and NaN count as 0.

    Args:
        model: The float model.
        batches: Calibration feeds.
        tensors: Name of a float tensor -> its channel axis (negative counts from the last); graph inputs are allowed.
        config: How to run.
        progress: Called with the number of samples done so far.

    Raises:
        DataError: There are no rows, or they do not fit the model.
    """
    fed = {spec[0] for spec in graph.input_specs(model)}
    inner = [name for name in tensors if name not in fed]
    session = Session(graph.with_outputs(model, inner, keep=False) if inner else model, config)
    seen = {name: _Peaks() for name in tensors}
    done = 0
    for feeds in _pieces(batches, has_free_rows(session)):
        found = session.run({spec.name: feeds[spec.name] for spec in session.inputs}, inner) if inner else {}
        rows = count_rows(feeds)
        for name, axis in tensors.items():
            seen[name].add(found.get(name, feeds.get(name)), axis, done, rows)
        done += rows
        if progress is not None:
            progress(done)
    if not done:
        raise DataError("the calibration data holds no rows.")
    return {name: peaks.result() for name, peaks in seen.items()}


def _pieces(batches: Iterable[Feeds], cut: bool) -> Iterator[Feeds]:
    """All samples in order, few at a time where batches may be cut."""
    for feeds in batches:
        whole = not cut or len({len(value) for value in feeds.values()}) != 1
        rows = count_rows(feeds)
        for start in (0,) if whole else range(0, rows, PIECE):
            yield feeds if whole else {name: value[start : start + PIECE] for name, value in feeds.items()}


class _Peaks:
    """The largest magnitude of every sample, and of every channel in each of the first samples."""

    def __init__(self) -> None:
        self._samples: dict[int, float] = {}
        self._channels: list[npt.NDArray[np.float32]] = []

    def add(self, values: Array | None, axis: int, first: int, rows: int) -> None:
        """Take in a batch whose first sample is number `first`."""
        magnitudes = np.abs(np.nan_to_num(np.asarray(values, np.float32), posinf=0.0, neginf=0.0))
        channels = np.moveaxis(magnitudes, axis, -1)
        apart = axis % magnitudes.ndim != 0 and len(magnitudes) == rows
        peaks = channels.reshape(rows if apart else 1, -1, channels.shape[-1]).max(axis=1, initial=0.0)
        for index, peak in enumerate(peaks.max(axis=1, initial=0.0)):
            self._samples[first + index] = float(peak)
        self._channels += list(peaks[: KEPT_SAMPLES - len(self._channels)])

    def result(self) -> TensorOutliers:
        """Channels and samples that stand out."""
        channels = np.median(np.stack(self._channels), axis=0)
        numbers = np.fromiter(self._samples, np.int64)
        samples = np.fromiter(self._samples.values(), np.float64)
        return TensorOutliers(_extreme(np.arange(len(channels)), channels), _extreme(numbers, samples), len(channels))


def _extreme(numbers: npt.NDArray[np.int64], magnitudes: npt.NDArray[np.floating]) -> tuple[Outlier, ...]:
    """Those of the magnitudes that stand out, with their numbers; dead ones are not compared with."""
    alive = magnitudes > TINY
    if not alive.any():
        return ()
    numbers, heights = numbers[alive], np.log2(magnitudes[alive].astype(np.float64))
    middle = float(np.median(heights))
    spread = max(float(np.median(np.abs(heights - middle))), NARROW)
    scores = 0.6745 * (heights - middle) / spread
    found = [
        Outlier(int(numbers[i]), float(2 ** heights[i]), float(2 ** (heights[i] - middle)), float(scores[i]))
        for i in np.argsort(-heights, kind="stable")
        if scores[i] > SCORE and heights[i] - middle > np.log2(TIMES)
    ]
    return tuple(found)
