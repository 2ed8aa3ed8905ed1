"""The values that flow between the stages. All are frozen; none knows how it was made."""

from onnxq.types.apart import TunedLayer
from onnxq.types.flow import (
    Array,
    BlockResult,
    Border,
    Dataset,
    Dim,
    Feeds,
    InputSpec,
    LearnedLayer,
    LogGrid,
    Observations,
    QuantPlan,
    TensorGrid,
    TensorStats,
    Tuned,
)
from onnxq.types.log import Log, Silence, Within
from onnxq.types.paired import Paired, PerRow
from onnxq.types.results import (
    BlockInfo,
    Coverage,
    Evaluation,
    Fidelity,
    FloatNode,
    Inspection,
    LayerInfo,
    Summary,
    Verdict,
)
from onnxq.types.rewriting import Applied, Rewriting
from onnxq.types.speed import Change, Comparison, Formed, Interval, Latency, Peak, Placed, Roof, Work, compare_words
from onnxq.types.target import BlockGrid
from onnxq.types.tuning import TuningStep
from onnxq.types.weights import WeightGrid

__all__ = [
    "Applied",
    "Array",
    "BlockGrid",
    "BlockInfo",
    "BlockResult",
    "Border",
    "Change",
    "Comparison",
    "Coverage",
    "Dataset",
    "Dim",
    "Evaluation",
    "Feeds",
    "Fidelity",
    "FloatNode",
    "Formed",
    "InputSpec",
    "Inspection",
    "Interval",
    "Latency",
    "LayerInfo",
    "LearnedLayer",
    "Log",
    "LogGrid",
    "Observations",
    "Paired",
    "Peak",
    "PerRow",
    "Placed",
    "QuantPlan",
    "Rewriting",
    "Roof",
    "Silence",
    "Summary",
    "TensorGrid",
    "TensorStats",
    "Tuned",
    "TunedLayer",
    "TuningStep",
    "Verdict",
    "WeightGrid",
    "Within",
    "Work",
    "compare_words",
]
