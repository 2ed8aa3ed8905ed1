"""What people and programs read: terminal tables and JSON."""

from onnxq.report.document import (
    benchmark_document,
    evaluation_document,
    inspection_document,
    quantize_document,
    to_json,
)
from onnxq.report.rewriting import print_reparam, reparam_document
from onnxq.report.terminal import (
    print_benchmark,
    print_evaluation,
    print_inspection,
    print_quantize,
)

__all__ = [
    "benchmark_document",
    "evaluation_document",
    "inspection_document",
    "print_benchmark",
    "print_evaluation",
    "print_inspection",
    "print_quantize",
    "print_reparam",
    "quantize_document",
    "reparam_document",
    "to_json",
]
