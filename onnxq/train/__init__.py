"""Training for easy quantization: range losses for torch users, and imported ONNX models as trainable modules."""

from onnxq.train.distill import Distillation, distill
from onnxq.train.imported import Imported
from onnxq.train.r2 import KINDS, Kind, R2Loss, WeightRange, ranges_of
from onnxq.train.weights import RangedWeight, weights_of

__all__ = [
    "KINDS",
    "Distillation",
    "Imported",
    "Kind",
    "R2Loss",
    "RangedWeight",
    "WeightRange",
    "distill",
    "ranges_of",
    "weights_of",
]
