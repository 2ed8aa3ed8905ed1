"""Which compute kernels onnxruntime's optimised graph of a model has.

    kernels.py MODEL.onnx        one JSON line

{"integer": {"QLinearConv": 20, ...}, "float": {"Conv": 1, ...}}
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INTEGER = (
    "QLinearConv",
    "QLinearMatMul",
    "QGemm",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "ConvInteger",
    "MatMulInteger",
)
FLOAT = ("Conv", "FusedConv", "NhwcFusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul")


def optimised_nodes(model: str) -> Iterator[Any]:
    """The nodes that the CPU provider runs, those of If and Loop bodies too."""
    import onnx
    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch) / "optimised.onnx")
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.optimized_model_filepath, options.log_severity_level = path, 4
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        graphs = [onnx.load(path).graph]
    while graphs:
        for node in graphs.pop().node:
            yield node
            graphs += [attribute.g for attribute in node.attribute if attribute.HasField("g")]


def count(model: str) -> dict[str, dict[str, int]]:
    """Integer and float compute kernels by operator."""
    counts = Counter(node.op_type for node in optimised_nodes(model))
    groups = {"integer": INTEGER, "float": FLOAT}
    return {group: {op: counts[op] for op in ops if counts[op]} for group, ops in groups.items()}


if __name__ == "__main__":
    print(json.dumps(count(sys.argv[1])))
