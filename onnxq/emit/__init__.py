"""From a plan to a QDQ model."""

from onnxq.emit.qdq import emit, weight_codes

__all__ = ["emit", "weight_codes"]
