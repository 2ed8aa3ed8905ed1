"""Feeds, statistics and plans: what passes from one stage to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from onnxq.types.target import BlockGrid
from onnxq.types.weights import WeightGrid

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
        bits: Number of bits; fewer than 8 are emulated inside 8-bit codes, 16 have codes of their own.
        signed: Signed or unsigned codes.
        everywhere: Float nodes read the grid, too; otherwise only integer nodes do.
        rule: The range rule that set it ("mse", "maxpool: tied to relu_1", ...).
    """

    scale: float
    zero_point: int
    bits: int = 8
    signed: bool = False
    everywhere: bool = True
    rule: str = ""


BORDER_LIMITS = (0.05, 0.95)
"""No rounding border leaves this interval, so that 0.0 keeps its code."""


@dataclass(frozen=True)
class Border:
    """From which fraction on the values of an activation tensor are rounded up, where that is not one half.

    code = clip(floor(u + 1 - B(t))), with u the value in codes, t = (u - lowest code) / (number of codes - 1), and

        B(t) = sigmoid(4 (b0 + b1 t + b2 t^2))    inside `BORDER_LIMITS`, t cut off at 0 and 1

    Attributes:
        axis: The channel axis, counted from the last: below 0.
        terms: (b0, b1, b2) of each channel.
    """

    axis: int
    terms: tuple[tuple[float, float, float], ...]


@dataclass(frozen=True)
class LogGrid:
    """Codes of attention probabilities A that count halvings, or half halvings: for few bits.

    code = clip(rint(p log2(A)) + last, 0, last)        last = 2^bits - 1,   p = `per_octave`
    A^   = 2^((code - last) / p), and 0 where the code is 0

    Z. Li et al., "RepQ-ViT", arXiv 2212.08254, section 3.3 (p = 2, log-sqrt2), here with the lowest code for zero: what
    is masked stays masked, and 2^bits codes are all there are.

    Attributes:
        bits: Number of bits, 2 to 8.
        per_octave: Codes from one power of two to the next, 1 or 2.
    """

    bits: int
    per_octave: int = 2


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
        borders: Rounding borders of some of `tensors`; float operators shift the values in front of QuantizeLinear.
        log_softmax: Softmax nodes whose result the nodes of `integer` read from a logarithmic grid.
        blocks: MatMul nodes with weights in blocks and float activations. half: Nodes that compute in float16.
        dynamic: Those of `tensors` that the runtime rounds to the range of their values in every run, where the target
            has a product for it; elsewhere, and while learning, their grid holds.
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
    borders: Mapping[str, Border] = field(default_factory=dict)
    log_softmax: Mapping[str, LogGrid] = field(default_factory=dict)
    blocks: Mapping[str, BlockGrid] = field(default_factory=dict)
    half: tuple[str, ...] = ()
    dynamic: tuple[str, ...] = ()

    @property
    def simulated(self) -> bool:
        """Whether some activations are rounded in a way that the CPU has no integer kernel for."""
        return bool(self.borders) or any(grid.bits != 8 for grid in self.tensors.values())


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


@dataclass(frozen=True)
class BlockResult:
    """What one method did to one block.

    Attributes:
        block: The block.
        method: The method.
        before: Noise over signal at the block's outputs on the held rows, before.
        after: The same after.
        kept: Whether the result was kept.
        seconds: Time it took.
    """

    block: str
    method: str
    before: float
    after: float
    kept: bool
    seconds: float
