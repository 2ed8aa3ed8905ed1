"""Attention cores, and which of their operands go onto grids when a recipe asks for that.

    scores = Q K^T;    A = Softmax(scale, bias and mask of the scores);    result = A V

Both products have operands that are computed at run time. They stay in float unless asked for: at 8 bits the runtime's
integer kernels are slower for them (docs/transformers.md), below 8 bits everything is a simulation anyway. When asked
for, Q, K and V get one uniform grid each, and A a uniform or a logarithmic one. What lies between scores and Softmax
is never quantized: a mask of -1e9 would leave no step for anything else.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from onnxq import graph
from onnxq.graph import Model, Node, Value
from onnxq.plan.units import Unit
from onnxq.types import LogGrid

SOFTMAXES = ("auto", "uniform", "log-sqrt2", "log2")
FEW_BITS = 6
"""Up to here, "auto" takes a logarithmic grid: its error of about 10 % does not shrink with more bits."""
FINE_BITS = 4
"""From here on, codes half an octave apart reach far enough down."""
BETWEEN = {
    "Add", "Sum", "Sub", "Mul", "Div", "Where", "Max", "Min", "Clip", "Tanh", "Reshape", "Transpose", "Squeeze",
    "Unsqueeze", "Cast",
}  # fmt: skip
"""What may stand between scores and Softmax."""


@dataclass(frozen=True)
class Attention:
    """How the products of attention are quantized.

    Attributes:
        bits: Of Q, K, V and the probabilities; 0 leaves all of it in float.
        softmax: One of `SOFTMAXES`: the grid of the probabilities. "auto" is logarithmic up to `FEW_BITS` bits.
    """

    bits: int = 0
    softmax: str = "auto"

    @property
    def log_grid(self) -> LogGrid | None:
        """The logarithmic grid of the probabilities; None for a uniform one."""
        if self.softmax == "uniform" or (self.softmax == "auto" and self.bits > FEW_BITS):
            return None
        fine = self.softmax == "log-sqrt2" or (self.softmax == "auto" and self.bits >= FINE_BITS)
        return LogGrid(self.bits, 2 if fine else 1)


FLOAT = Attention()


@dataclass(frozen=True)
class Core:
    """One attention core.

    Attributes:
        softmax: Its Softmax.
        scores: The products whose results reach it.
        values: The products that read its result.
    """

    softmax: Node
    scores: tuple[Node, ...]
    values: tuple[Node, ...]


def cores(model: Model) -> Iterator[Core]:
    """Every Softmax of the main graph whose result is multiplied with something computed at run time."""
    for node in graph.nodes(model, "Softmax"):
        values = tuple(user for user in graph.users(node.outputs[0]) if _is_product(user))
        if values:
            yield Core(node, tuple(_scores(node.inputs[0])), values)


def _is_product(node: Node) -> bool:
    """A MatMul of two float32 matrices that are both computed."""
    if node.op_type != "MatMul" or node.domain not in ("", "ai.onnx"):
        return False
    return all(
        value is not None and graph.constant(value) is None and graph.dtype_name(value) in (None, "float32")
        for value in node.inputs
    )


def _scores(value: Value | None) -> Iterator[Node]:
    """Products that `value` is computed from, with nothing but `BETWEEN` in between."""
    pending, passed = [value], set()
    while pending:
        node = graph.producer(pending.pop())
        if node is None or node in passed:
            continue
        passed.add(node)
        if _is_product(node):
            yield node
        elif node.op_type in BETWEEN and node.domain in ("", "ai.onnx"):
            pending += node.inputs


def with_products(units: Iterable[Unit], found: Sequence[Core], attention: Attention) -> list[Unit]:
    """`units` with the products of attention as candidates for integers.

    What is read from a logarithmic grid is no input of an integer kernel: such a product has V alone on a uniform one.
    """
    products = {node for core in found for node in (*core.scores, *core.values)}
    logs = {core.softmax.outputs[0] for core in found} if attention.log_grid is not None else set()
    return [_as_product(unit, logs) if unit.node in products else unit for unit in units]


def _as_product(unit: Unit, logs: Collection[Value]) -> Unit:
    inputs = tuple(dict.fromkeys(value for value in unit.inputs if value not in logs))
    return replace(unit, kind="product", inputs=inputs, reason="")


def log_grids(found: Iterable[Core], integer: Iterable[Unit], attention: Attention) -> dict[str, LogGrid]:
    """The logarithmic grid of every Softmax whose result one of the units `integer` reads, by node name."""
    inside = {unit.node for unit in integer}
    grid = attention.log_grid
    return {} if grid is None else {str(core.softmax.name): grid for core in found if inside.intersection(core.values)}
