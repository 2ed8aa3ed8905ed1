"""Feeds, statistics and plans: what passes from one stage to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Feeds = dict[str, Array]
"""One batch of model inputs: input name -> array."""

Dim = int | str | None
"""A fixed size, the name of a symbolic size, or an unnamed dynamic size."""


@dataclass(frozen=True)
class InputSpec:
    """What a model input takes.

    Attributes:
        name: The input's name.
        dtype: numpy name of its element type ("float32", "int64").
        shape: One entry per axis.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def __str__(self) -> str:
        dims = ",".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.name}: {self.dtype}[{dims}]"


@runtime_checkable
class Dataset(Protocol):
    """Batches of model inputs that can be iterated any number of times, each time in the same order.

    Nothing is kept between batches. The first axis of every array of a batch counts rows when the model's first
    axis does; a model with a fixed first axis gets batches of exactly that size.
    """

    @property
    def provenance(self) -> Mapping[str, object]:
        """Where the rows came from and how they were preprocessed; JSON-serialisable."""
        ...

    def __iter__(self) -> Iterator[Feeds]:
        """Yield one batch at a time."""
        ...


@dataclass(frozen=True)
class TensorStats:
    """What calibration saw of one float tensor; its size does not depend on the number of samples.

    Attributes:
        name: The tensor.
        low: Smallest value.
        high: Largest value.
        mean_low: Mean over samples of each sample's smallest value (CalibTIP's averaged min-max).
        mean_high: Mean over samples of each sample's largest value.
        counts: Histogram, shape [bins], over [-limit, limit].
        limit: Half width of the histogram.
        count: Number of values in the histogram.
        finite: False when an infinity or NaN was seen (they are left out of everything above).
        shape: Shape in the first batch.
    """

    name: str
    low: float
    high: float
    mean_low: float
    mean_high: float
    counts: npt.NDArray[np.float64]
    limit: float
    count: int
    finite: bool
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Observations:
    """Statistics of every tensor asked for, and of every output's shape.

    Attributes:
        tensors: Float tensors by name.
        shapes: Shape of each weighted node's output in the first batch, by node name.
        rows: Number of calibration rows.
        batch_rows: Rows of the first batch (the divisor that turns `shapes` into work per row).
    """

    tensors: Mapping[str, TensorStats]
    shapes: Mapping[str, tuple[int, ...]]
    rows: int
    batch_rows: int


@dataclass(frozen=True)
class TensorGrid:
    """The grid of one activation tensor.

    Attributes:
        scale: Size of a step.
        zero_point: The code of 0.0.
        bits: Number of bits; fewer than 8 are emulated inside 8-bit codes.
        signed: int8 or uint8 codes.
        everywhere: Float nodes read the grid, too; otherwise only integer nodes do.
        rule: The range rule that set it ("mse", "maxpool: tied to relu_1", ...).
    """

    scale: float
    zero_point: int
    bits: int = 8
    signed: bool = False
    everywhere: bool = True
    rule: str = ""


@dataclass(frozen=True)
class WeightGrid:
    """The symmetric grid of one weighted node's weights.

    Attributes:
        scales: One step per output channel, or a single one.
        axis: The kept axis of the weight, None for a single step.
        bits: Number of bits; fewer than 8 are stored in int8 codes.
    """

    scales: tuple[float, ...]
    axis: int | None
    bits: int = 8


@dataclass(frozen=True)
class QuantPlan:
    """Everything emission needs besides the float model: plain data that saves to JSON.

    Attributes:
        target: Name of the target profile.
        source: SHA-256 of the prepared float model.
        tensors: Quantized activation tensors.
        weights: Weighted nodes that run in integers, by node name.
        integer: All nodes that run on integer tensors, by node name.
        skipped: Node name -> why it stays in float.
        guards: Tensors behind which a one-input Sum keeps the runtime from fusing; behind one of `tensors`, it stands
            in front of the QuantizeLinear alone.
        sums: Add nodes to be written as Sum, so that the runtime does not fuse them.
        constants: Constant operands of integer element-wise nodes: initializer name -> its grid.
        tables: Gather nodes whose constant table is stored in int8, one step per row.
    """

    target: str
    source: str
    tensors: Mapping[str, TensorGrid]
    weights: Mapping[str, WeightGrid]
    integer: tuple[str, ...]
    skipped: Mapping[str, str]
    guards: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    constants: Mapping[str, TensorGrid] = field(default_factory=dict)
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class LearnedLayer:
    """What a method found for one weighted node, in place of plain rounding.

    Attributes:
        codes: Weight codes, int8, in the weight's shape; the plan holds their steps.
        bias: float32 [output channels]; None keeps the layer's own.
    """

    codes: npt.NDArray[np.int8]
    bias: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Tuned:
    """A plan and what was learned for it.

    Attributes:
        plan: Grids and placement.
        layers: Learned layers by node name; the others are rounded plainly.
    """

    plan: QuantPlan
    layers: Mapping[str, LearnedLayer] = field(default_factory=dict)
