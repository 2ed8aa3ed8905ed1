"""The values that flow between the stages. All are frozen; none knows how it was made."""

from onnxq.types.flow import (
    Array,
    Dataset,
    Dim,
    Feeds,
    InputSpec,
    Observations,
    QuantPlan,
    TensorGrid,
    TensorStats,
    WeightGrid,
)
from onnxq.types.log import Log, Silence
from onnxq.types.results import (
    Coverage,
    Evaluation,
    Fidelity,
    FloatNode,
    Inspection,
    Interval,
    Latency,
    LayerInfo,
    Summary,
    Verdict,
)
from onnxq.types.rewriting import Applied, Rewriting

__all__ = [
    "Applied",
    "Array",
    "Coverage",
    "Dataset",
    "Dim",
    "Evaluation",
    "Feeds",
    "Fidelity",
    "FloatNode",
    "InputSpec",
    "Inspection",
    "Interval",
    "Latency",
    "LayerInfo",
    "Log",
    "Observations",
    "QuantPlan",
    "Rewriting",
    "Silence",
    "Summary",
    "TensorGrid",
    "TensorStats",
    "Verdict",
    "WeightGrid",
]
