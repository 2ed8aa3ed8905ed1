"""Channels and samples that hold extreme values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Outlier:
    """One channel or sample.

    Attributes:
        index: Of the channel, or the number of the sample in the data.
        magnitude: Its magnitude, as `onnxq.calibrate.outliers` defines it.
        times: The same over the median of all.
        score: How far it is from the others.
    """

    index: int
    magnitude: float
    times: float
    score: float


@dataclass(frozen=True)
class TensorOutliers:
    """Of one tensor, the most extreme first.

    Attributes:
        channels: Outlier channels.
        samples: Outlier samples.
        count: Number of channels.
    """

    channels: tuple[Outlier, ...]
    samples: tuple[Outlier, ...]
    count: int
