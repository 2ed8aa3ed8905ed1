"""From a plan to a QDQ model."""

from onnxq.emit.qdq import emit

__all__ = ["emit"]
