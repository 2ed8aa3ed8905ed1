"""What a report shows of single layers and tensors, beyond a run's summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxq.types.outliers import TensorOutliers
from onnxq.types.rewriting import Applied


@dataclass(frozen=True)
class Bars:
    """A histogram of bins of equal width.

    Attributes:
        counts: Values in each bin, 1 to 64 bins.
        low: Lower end of the first bin.
        high: Upper end of the last bin.
    """

    counts: tuple[float, ...]
    low: float
    high: float


@dataclass(frozen=True)
class WeightDetail:
    """The weight of one layer.

    Attributes:
        values: Of the float weight.
        codes: Of the integer codes; None where the layer stays in float.
        clip: Ends of the widest grid among its channels; None where it stays in float.
        sqnr_db: Of the restored weight against the float one; None where it stays in float.
        widest: Output channel with the largest magnitude.
        spread: That magnitude over the median channel's; 1 for a single channel, infinite where the median is 0.
    """

    values: Bars
    codes: Bars | None
    clip: tuple[float, float] | None
    sqnr_db: float | None
    widest: int
    spread: float


@dataclass(frozen=True)
class LayerDetail:
    """One Conv, ConvTranspose, Gemm or MatMul.

    Attributes:
        name: Node name.
        op_type: Operator.
        block: The block that it is in.
        stage: Number of that block's stage, from 0.
        shape: Of its weight; empty where both operands are computed.
        weight_bits: 32 in float.
        input_bits: Of the tensor that it reads; 32 in float.
        float_bytes: Of the weight in float.
        stored_bytes: Of the weight in the quantized file, its steps and zero points.
        macs: Multiply-accumulates per row.
        reason: Why it stays in float; empty where it runs in integers.
        tuned: Its codes, steps or bias are not those of plain rounding.
        source: The tensor that it reads.
        result: The tensor whose error is shown: its result behind bias and activation.
        sqnr_db: Of that tensor in the quantized network against the float network; None where not measured.
        weight: None where both operands are computed.
    """

    name: str
    op_type: str
    block: str
    stage: int
    shape: tuple[int, ...]
    weight_bits: int
    input_bits: int
    float_bytes: int
    stored_bytes: int
    macs: int
    reason: str
    tuned: bool
    source: str
    result: str
    sqnr_db: float | None
    weight: WeightDetail | None

    @property
    def integer(self) -> bool:
        """Whether it was placed in integers."""
        return not self.reason


@dataclass(frozen=True)
class TensorDetail:
    """One quantized activation.

    Attributes:
        values: Of the float tensor on the calibration rows.
        low: Smallest value seen.
        high: Largest value seen.
        clip: Ends of its grid.
        scale: Step of its grid.
        zero_point: Code of 0.0.
        bits: Of its grid.
        rule: The range rule that set it.
        clipped: Share of the values beyond the grid's ends.
        sqnr_db: What this grid alone costs, from the histogram; None for a tensor of zeros.
    """

    values: Bars
    low: float
    high: float
    clip: tuple[float, float]
    scale: float
    zero_point: int
    bits: int
    rule: str
    clipped: float
    sqnr_db: float | None


@dataclass(frozen=True)
class FlowNode:
    """An input, a layer, or a node in which branches meet.

    Attributes:
        name: Of the node or the input.
        op_type: Operator, or "input".
        sources: Numbers of the nodes that it reads from, others passed through; all are smaller than its own.
    """

    name: str
    op_type: str
    sources: tuple[int, ...]


@dataclass(frozen=True)
class Details:
    """Everything about single layers and tensors of one run.

    Attributes:
        layers: Weighted nodes and products of activations, in graph order.
        tensors: Quantized activations by name.
        rows: Held-out rows on which the layers' errors were measured.
        passes: What the rewrites did, in order.
        versions: Of the parts that made the file.
        sensitivity: Layer -> bits as people write them ("w4a8") -> error that the layer adds at them.
        front: (bytes, error) of the allocations that no other one beats.
        chosen: What was taken: one of them, or one near them where other budgets counted.
        outliers: What stands out in the tensors that layers read, by tensor; only those where something does.
        outlier_rows: Calibration rows that were looked at for it.
        flow: The graph as a map of layers and junctions, in graph order.
    """

    layers: tuple[LayerDetail, ...]
    tensors: Mapping[str, TensorDetail]
    rows: int
    passes: tuple[Applied, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    sensitivity: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    front: tuple[tuple[float, float], ...] = ()
    chosen: tuple[float, float] | None = None
    outliers: Mapping[str, TensorOutliers] = field(default_factory=dict)
    outlier_rows: int = 0
    flow: tuple[FlowNode, ...] = ()
