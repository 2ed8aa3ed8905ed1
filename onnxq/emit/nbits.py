"""Weight-only layers: 4- or 8-bit codes with a step per block of inputs, and float activations.

    MatMul(x, W)  ->  com.microsoft::MatMulNBits(x, codes, steps)        W[k, n] = codes[k, n] * steps[k // block, n]

Codes reach from -8 to 7 (of 8 bits from -128 to 127), and a step may be negative: then the lowest code is the largest
positive weight. Of 4 bits, a block's step is the one of a few candidates whose squared error is least.

onnxruntime multiplies in 8-bit integers and rounds the activations itself, each block of a row with a step of its own.
The weights are read as they are stored, so it is products of few rows that gain: with more than about 8, int8 layers
with calibrated activations (`qdq`) are faster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.errors import UnsupportedError
from onnxq.graph import Model, Node
from onnxq.grid import SMALLEST_SCALE

DOMAIN = "com.microsoft"
SMALLEST_BLOCK = 16
ACCURACY_LEVEL = 4
"""Products of 8-bit integers; what is less exact is not offered, and products of floats are no faster than MatMul."""
SHRINKS = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.1, 8 / 7)


@dataclass(frozen=True)
class BlockWeight:
    """The weight of a MatMul in blocks.

    Attributes:
        codes: int8 [inputs, outputs], from -2 ** (bits - 1) to 2 ** (bits - 1) - 1.
        steps: float32 [ceil(inputs / block), outputs]; not 0.
        bits: 4 or 8.
        block: Inputs that share a step: a power of two, 16 or more.
    """

    codes: npt.NDArray[np.int8]
    steps: npt.NDArray[np.float32]
    bits: int
    block: int

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"blocks of 4 or 8 bits, not {self.bits}")
        if self.block < SMALLEST_BLOCK or self.block & (self.block - 1):
            raise ValueError(f"a block is a power of two from {SMALLEST_BLOCK} on, not {self.block}")
        inputs, outputs = self.codes.shape
        if self.steps.shape != (-(-inputs // self.block), outputs):
            raise ValueError(f"steps {self.steps.shape} for codes {self.codes.shape} in blocks of {self.block}")
        half = 2 ** (self.bits - 1)
        if self.codes.size and not -half <= self.codes.min() <= self.codes.max() < half:
            raise ValueError(f"codes beyond {self.bits} bits")

    def floats(self) -> npt.NDArray[np.float32]:
        """What the codes stand for, float32 [inputs, outputs]."""
        return self.codes.astype(np.float32) * along(self.steps, self.block, len(self.codes))


def round_blocks(weight: npt.NDArray[np.float32], bits: int, block: int, *, signed: bool = False) -> BlockWeight:
    """Round a weight [inputs, outputs] to the nearest codes, each block's step by `block_steps`."""
    steps = block_steps(weight, bits, block, signed=signed)
    half = 2 ** (bits - 1)
    codes = np.clip(np.rint(weight / along(steps, block, len(weight))), -half, half - 1).astype(np.int8)
    return BlockWeight(codes, steps, bits, block)


def along(steps: npt.NDArray[np.float32], block: int, inputs: int) -> npt.NDArray[np.float32]:
    """The step of every weight, float32 [inputs, outputs]."""
    found: npt.NDArray[np.float32] = np.repeat(steps, block, axis=0)[:inputs]
    return found


def block_steps(
    weight: npt.NDArray[np.float32], bits: int, block: int, *, signed: bool = False
) -> npt.NDArray[np.float32]:
    """Steps of a weight [inputs, outputs], float32 [ceil(inputs / block), outputs].

    Of 8 bits, the largest magnitude over 127. Of 4, from `SHRINKS` times the largest magnitude over 8, that with the
    least squared error; where `signed`, of either sign.
    """
    inputs, outputs = weight.shape
    padded = np.pad(weight, ((0, -inputs % block), (0, 0))).reshape(-1, block, outputs)
    half = 2 ** (bits - 1)
    largest = np.abs(padded).max(axis=1)
    if bits == 8:
        return np.asarray(np.maximum(largest / np.float32(half - 1), SMALLEST_SCALE), np.float32)
    whole = np.where(largest > 0, largest, 1).astype(np.float32)
    shares = padded / whole[:, None]  # squares of the weights themselves may be beyond float32
    best = np.full(largest.shape, np.inf, np.float32)
    steps = np.ones(largest.shape, np.float32)
    for step in (np.float32(sign * shrink / half) for shrink in SHRINKS for sign in ((1, -1) if signed else (1,))):
        codes = np.clip(np.rint(shares / step), -half, half - 1)
        error = np.square(codes * step - shares).sum(axis=1)
        better = error < best
        best[better], steps[better] = error[better], step
    return np.copysign(np.maximum(np.abs(steps) * whole, SMALLEST_SCALE), steps).astype(np.float32)


def store_blocks(model: Model, node: Node, weight: BlockWeight) -> None:
    """Replace a MatMul by a constant matrix with MatMulNBits, in place; the node keeps its name.

    Args:
        model: Gets the operator set com.microsoft.
        node: A MatMul of the main graph whose second operand is a constant matrix.
        weight: Its weight.

    Raises:
        UnsupportedError: The node is no such MatMul, or its weight has another shape.
    """
    layer = graph.layer_of(node)
    if isinstance(layer, str) or node.op_type != "MatMul":
        raise UnsupportedError(f"{node.name!r} is no product with a constant matrix.")
    if layer.weight.shape != weight.codes.shape:
        raise UnsupportedError(f"blocks of shape {list(weight.codes.shape)} do not fit {node.name!r}.")
    inputs, outputs = weight.codes.shape
    name = str(node.name)
    stored = graph.add_constant(model, f"{name}.weight_blocks", _bytes(weight))
    steps = graph.add_constant(model, f"{name}.weight_steps", np.ascontiguousarray(weight.steps.T).reshape(-1))
    sizes = {"K": inputs, "N": outputs, "bits": weight.bits, "block_size": weight.block}
    attributes = {**sizes, "accuracy_level": ACCURACY_LEVEL}
    model.opset_imports.setdefault(DOMAIN, 1)
    old, operands = node.outputs[0], [layer.data, stored, steps]
    new = graph.add_node(
        model, "MatMulNBits", operands, f"{name}_blocks", before=node, attributes=attributes, domain=DOMAIN
    )
    new.type, new.shape = old.type, old.shape
    graph.redirect(old, new)
    graph.move_name(old, new, model)
    made = new.producer()
    model.graph.remove(node, safe=True)
    assert made is not None
    made.name = name


def _bytes(weight: BlockWeight) -> npt.NDArray[np.uint8]:
    """Codes counted from the lowest one, [outputs, blocks, bytes of a block]; of 4 bits the first one is low."""
    inputs, outputs = weight.codes.shape
    half = 2 ** (weight.bits - 1)
    offsets = np.pad(weight.codes.astype(np.int16), ((0, -inputs % weight.block), (0, 0))) + half
    blocks = offsets.astype(np.uint8).T.reshape(outputs, -1, weight.block)
    if weight.bits == 4:
        blocks = blocks[..., 0::2] | blocks[..., 1::2] << 4
    return np.ascontiguousarray(blocks)
