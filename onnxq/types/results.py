"""What measurements and whole runs return."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from onnxq.types.flow import BlockResult, InputSpec, QuantPlan
from onnxq.types.outliers import TensorOutliers
from onnxq.types.paired import Paired, PerRow
from onnxq.types.speed import Formed, Interval, Latency, Placed
from onnxq.types.tuning import TuningStep


@dataclass(frozen=True)
class FloatNode:
    """A node that stayed in float, and why."""

    name: str
    op_type: str
    reason: str
    macs: int = 0


@dataclass(frozen=True)
class Coverage:
    """What the provider's optimised graph executes.

    Attributes:
        integer_macs: Multiply-accumulates per row of Conv/Gemm/MatMul nodes in integer kernels.
        total_macs: Of all such nodes, with constant weights or not.
        kernels: Number of nodes by kernel name in the optimised graph.
        floats: Weighted nodes (and matrix products of activations) that run in float.
        constant_bytes: Bytes of the constants that the kernels read.
        planned: Nothing was executed on the provider: this is what the plan means to run in integers.
    """

    integer_macs: int
    total_macs: int
    kernels: Mapping[str, int]
    floats: tuple[FloatNode, ...]
    constant_bytes: int = 0
    planned: bool = False

    @property
    def share(self) -> float:
        """Integer coverage, 0 to 1."""
        return self.integer_macs / self.total_macs if self.total_macs else 0.0


@dataclass(frozen=True)
class Fidelity:
    """How near the quantized model's outputs are to the float model's, on rows calibration did not see.

    Attributes:
        rows: Number of rows compared.
        sqnr_db: Signal-to-quantization-noise ratio per output, decibels.
        agreement: Share of rows with the same arg-max, None where no output looks like logits.
        agreed: Which rows have the same arg-max.
        uneven: Outputs that are in none of this, as the two models gave them different shapes: what a detector finds.
    """

    rows: int
    sqnr_db: Mapping[str, float]
    agreement: Interval | None
    agreed: PerRow | None = None
    uneven: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What verification found about a quantized model.

    Attributes:
        fidelity: Against the float model on held-out rows.
        coverage: Of the provider's optimised graph.
        float_bytes: Size of the float file.
        quantized_bytes: Size of the quantized file.
        latency: (float, quantized) measured in interleaved pairs; empty when not measured.
        optimized_gap: Largest difference between an optimised kernel and the plain meaning of its nodes, in steps of
            its output's grid; NaN where the provider's kernels were not run.
        warnings: Sentences the user must read.
        placed: What measured placement changed; None where it was not at work.
        formed: What other forms of products gained; None where none were timed.
        notes: What was not measured, and why.
    """

    fidelity: Fidelity
    coverage: Coverage
    float_bytes: int
    quantized_bytes: int
    latency: tuple[Latency, ...]
    optimized_gap: float
    warnings: tuple[str, ...] = ()
    placed: Placed | None = None
    formed: Formed | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    Attributes:
        rows: Rows used.
        accuracy: Top-1 with a 95 % interval; None without labels.
        reference_accuracy: The reference's top-1 on the same rows.
        paired: Both models row by row; None without reference or labels.
        fidelity: Against the reference; None without one.
        correct: Which rows it got right; None without labels.
    """

    rows: int
    accuracy: Interval | None
    reference_accuracy: Interval | None
    paired: Paired | None
    fidelity: Fidelity | None
    correct: PerRow | None = None


@dataclass(frozen=True)
class LayerInfo:
    """One weighted node.

    Attributes:
        name: Node name.
        op_type: Operator.
        weight_shape: Shape of its weight.
        weight_dtype: How the weight is stored ("float32", "int8"; "uint8" or "int4" where packed).
        weight_bits: Width of its numbers: of signed codes, what the lowest and the highest that occur need; of a
            codebook, what an index into it needs.
        weight_bytes: Bytes in the file of the weight, its scales and zero points; tables that layers share left out.
        packed: Nodes unpack the weight when a session is created.
        codebook: Entries of the codebook, or of each channel's, that its codes are looked up in; 0 for none.
        codes: How often each code occurs, by code; None for a float weight.
        weight_scales: Number of weight scales, 0 for float weights.
        input_dtype: Codes of its input ("uint8", "int8"), or "float32".
        input_scale: Step of its input's grid, None in float and where every run finds its own.
        input_zero_point: Code of 0.0, None likewise.
        output_dtype: Codes of its result (behind an activation), or "float32".
    """

    name: str
    op_type: str
    weight_shape: tuple[int, ...]
    weight_dtype: str
    weight_bits: int
    weight_bytes: int
    packed: bool
    codebook: int
    codes: Mapping[int, int] | None
    weight_scales: int
    input_dtype: str
    input_scale: float | None
    input_zero_point: int | None
    output_dtype: str


@dataclass(frozen=True)
class BlockInfo:
    """One block of a float model.

    Attributes:
        name: From its first layer.
        stage: Number of the stage that it is in, from 0.
        inputs: Tensors that it reads.
        outputs: Tensors that it hands on.
        nodes: Number of its nodes.
        layers: Names of its weighted nodes in graph order.
    """

    name: str
    stage: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: int
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found.

    Attributes:
        path: The file.
        bytes: Its size with external data.
        opset: Version of the standard operator set.
        ir_version: Of the file format.
        inputs: Model inputs.
        outputs: Model output names.
        operators: Number of nodes by operator, most frequent first.
        weight_bytes: Bytes of initializers by element type.
        layers: Weighted nodes in graph order.
        coverage: Integer coverage on this machine's CPU; None for a float model.
        provenance: What onnxq recorded in the file.
        blocks: Blocks of a float model in the order in which they run; None when not asked for.
        outliers: Of the tensors that a float model's layers read; None when not asked for.
    """

    path: str
    bytes: int
    opset: int
    ir_version: int
    inputs: tuple[InputSpec, ...]
    outputs: tuple[str, ...]
    operators: Mapping[str, int]
    weight_bytes: Mapping[str, int]
    layers: tuple[LayerInfo, ...]
    coverage: Coverage | None
    provenance: Mapping[str, str]
    blocks: tuple[BlockInfo, ...] | None = None
    outliers: Mapping[str, TensorOutliers] | None = None

    @property
    def layer_weights(self) -> int:
        """Number of weights in layers."""
        return sum(math.prod(layer.weight_shape) for layer in self.layers)

    @property
    def layer_bytes(self) -> int:
        """Bytes of the layers' weights and scales."""
        return sum(layer.weight_bytes for layer in self.layers)

    @property
    def average_bits(self) -> float:
        """Mean width of a weight, 0 without layers."""
        total = sum(layer.weight_bits * math.prod(layer.weight_shape) for layer in self.layers)
        return total / self.layer_weights if self.layer_weights else 0.0


@dataclass(frozen=True)
class Summary:
    """One run of `quantize`, as reports show it.

    Attributes:
        source: The float file.
        output: The quantized file; None when it was not written.
        recipe: The resolved recipe's fields.
        data: Where the calibration rows came from.
        rows: Number of rows that calibrated the ranges.
        plan: Grids and placement.
        verdict: What verification found; None for a dry run.
        evaluation: On the labelled rows that were given.
        seconds: Wall time of the run.
        blocks: What learning did to each block.
        steps: What each stage of tuning did to the outputs.
    """

    source: str
    output: str | None
    recipe: Mapping[str, object]
    data: Mapping[str, object]
    rows: int
    plan: QuantPlan
    verdict: Verdict | None
    evaluation: Evaluation | None = None
    seconds: float = 0.0
    blocks: tuple[BlockResult, ...] = ()
    steps: tuple[TuningStep, ...] = ()
