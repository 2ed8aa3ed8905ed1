"""Targets: what a runtime's execution provider computes in integers, and in which form it wants to be told.

A target is data. Placement, grids, emission and verification ask its fields and never its name; a new target is one
more entry of `TARGETS`. docs/targets.md says where each rule comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Placing = Literal["kernels", "operands", "everything", "half"]
"""Which tensors get grids.

kernels: what onnxruntime's CPU kernels absorb, behind producers. operands: the inputs of layers, and the operand of a
residual addition that is not a convolution's result; nothing behind producers. everything: all that is computed in
float. half: nothing; what is heavy is computed in float16.
"""
LAYERS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
FEW = tuple(range(2, 8))
BLOCK_OPSET = 21
"""DequantizeLinear has blocks from here on."""
CPU_ONLY = ("MergeGroups", "PoolToConv", "TransposeToDepth")
"""Rewrites that trade multiply-accumulates for kernels that only onnxruntime's CPU provider lacks."""


@dataclass(frozen=True)
class BlockGrid:
    """Weight codes with a step for each block of inputs, read by a layer whose activations are floats.

    Attributes:
        bits: 4 or 8.
        block: Inputs that share a step.
    """

    bits: int
    block: int


@dataclass(frozen=True)
class Target:
    """The rules of one target.

    Attributes:
        name: As users give it.
        provider: The execution provider that runs the file, as `runtime.PROVIDERS` calls it.
        placing: Which tensors get grids.
        signed: Activations have int8 codes and the zero point 0; otherwise uint8 codes with a free zero point.
        float_bias: Biases stay float32; otherwise they are int32, in steps of input times weight.
        activation_bits: Widths of activations; fewer than 8 are emulated in 8-bit codes.
        weight_bits: Widths of weights.
        block: Inputs that share a step where the weights of products with 4 bits are stored in blocks and read by float
            activations; 0 where they are codes of the input's width.
        per_channel: Operators whose weights may have a step per output channel.
        own_pairs: Every reader of a tensor gets a QuantizeLinear and DequantizeLinear of its own.
        guarded: Nodes keep onnxruntime's CPU optimiser from what it gets wrong.
        tables: Embedding tables are stored in int8.
        packed: Weights of few bits may be stored packed, unpacked by nodes that the runtime folds.
        without: Rewrites of the float graph that only other targets gain by.
        nbits: Weights in blocks are those of the operator MatMulNBits.
        fused: Files hold operators of onnxruntime's own where it has faster ones than it makes of pairs:
            MatMulIntegerToFloat for products with float results, QuickGelu for SiLU.
        untimed: Why its latency cannot be measured here even where the provider is; "" where it can.
        note: Said when it is chosen.
    """

    name: str
    provider: str
    placing: Placing = "kernels"
    signed: bool = False
    float_bias: bool = False
    activation_bits: tuple[int, ...] = (8,)
    weight_bits: tuple[int, ...] = (*FEW, 8)
    block: int = 0
    per_channel: frozenset[str] = LAYERS
    own_pairs: bool = False
    guarded: bool = False
    tables: bool = False
    packed: bool = False
    without: tuple[str, ...] = ()
    nbits: bool = False
    fused: bool = False
    untimed: str = ""
    note: str = ""

    @property
    def on_cpu(self) -> bool:
        """Whether onnxruntime's CPU kernels compute the file, here or compiled for elsewhere."""
        return self.provider == "cpu"


CPU = Target(
    "cpu",
    "cpu",
    activation_bits=(*FEW, 8, 16),
    guarded=True,
    tables=True,
    packed=True,
    nbits=True,
    fused=True,
)
WEB = Target(
    "web",
    "cpu",
    activation_bits=(*FEW, 8),
    guarded=True,
    tables=True,
    packed=True,
    nbits=True,
    untimed="the file runs in a browser",
)
TENSORRT = Target(
    "tensorrt",
    "tensorrt",
    placing="operands",
    signed=True,
    float_bias=True,
    block=128,
    own_pairs=True,
    without=CPU_ONLY,
)
OPENVINO = Target("openvino", "openvino", float_bias=True, without=CPU_ONLY)
QNN = Target(
    "qnn",
    "qnn",
    placing="everything",
    activation_bits=(8, 16),
    per_channel=frozenset({"Conv"}),
    without=CPU_ONLY,
)
CUDA = Target(
    "cuda",
    "cuda",
    placing="half",
    weight_bits=(4, 8),
    block=32,
    nbits=True,
    without=(*CPU_ONLY, "SplitIdentity"),
    note="onnxruntime's CUDA provider has no integer kernels for convolutions and matrix products: the file computes "
    "in float16 (weights of 4 bits in MatMulNBits); for int8 on NVIDIA take --target tensorrt",
)
TARGETS: Mapping[str, Target] = {target.name: target for target in (CPU, TENSORRT, CUDA, OPENVINO, QNN, WEB)}
TARGET_NAMES = ("auto", *TARGETS)


def target_of(name: str) -> Target:
    """The target of that name; "auto" is this machine's processor.

    Raises:
        KeyError: There is none.
    """
    return CPU if name == "auto" else TARGETS[name]
