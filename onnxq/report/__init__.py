"""What people and programs read: terminal tables and JSON."""

from onnxq.report.benchmark import benchmark_document, print_benchmark, print_changes
from onnxq.report.comparing import print_compare, read_run
from onnxq.report.document import (
    evaluation_document,
    inspection_document,
    quantize_document,
    to_json,
)
from onnxq.report.harden import Hardening, harden_document, print_harden
from onnxq.report.html import html_compare, html_report
from onnxq.report.layers import print_layers
from onnxq.report.rewriting import print_reparam, reparam_document
from onnxq.report.sensitivity import print_sensitivity, sensitivity_document
from onnxq.report.sweep import print_sweep, sweep_document
from onnxq.report.terminal import (
    print_evaluation,
    print_inspection,
    print_quantize,
)

__all__ = [
    "Hardening",
    "benchmark_document",
    "evaluation_document",
    "harden_document",
    "html_compare",
    "html_report",
    "inspection_document",
    "print_benchmark",
    "print_changes",
    "print_compare",
    "print_evaluation",
    "print_harden",
    "print_inspection",
    "print_layers",
    "print_quantize",
    "print_reparam",
    "print_sensitivity",
    "print_sweep",
    "quantize_document",
    "read_run",
    "reparam_document",
    "sensitivity_document",
    "sweep_document",
    "to_json",
]
