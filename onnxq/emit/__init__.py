"""From a plan to a QDQ model."""

from onnxq.emit.packing import packed_bytes, stored_bytes
from onnxq.emit.products import products, weight_grid
from onnxq.emit.qdq import emit, weight_codes

__all__ = ["emit", "packed_bytes", "products", "stored_bytes", "weight_codes", "weight_grid"]
