"""What tuning layers apart from each other gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from onnxq.types.flow import BlockResult, Border, LearnedLayer, TensorGrid
from onnxq.types.weights import WeightGrid


@dataclass(frozen=True)
class TunedLayer:
    """What tuning one layer by itself changed.

    Attributes:
        block: Name of its slice.
        tensors: Grids of the tensors that the slice makes.
        weights: Weight grids of its layers.
        learned: Codes and biases of its layers.
        result: What the method did.
        notes: For the log.
        borders: Rounding borders of the tensors that the slice makes.
    """

    block: str
    tensors: Mapping[str, TensorGrid]
    weights: Mapping[str, WeightGrid]
    learned: Mapping[str, LearnedLayer]
    result: BlockResult
    notes: tuple[str, ...] = ()
    borders: Mapping[str, Border] = field(default_factory=dict)
