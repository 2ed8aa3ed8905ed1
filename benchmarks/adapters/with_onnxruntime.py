"""onnxruntime.quantization: `with_onnxruntime.py MODEL FEEDS OUT JSON`; settings: method.

"prepare" writes what quant_pre_process makes of the float file, "dynamic" is quantize_dynamic, anything else the
calibration method of quantize_static: QDQ, uint8 activations, weights per channel, few bits as overrides of tensors.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
from shared import Job, job, policy

sys.path.append(str(Path(__file__).resolve().parents[1]))
from rivals import Feeds, ort_dynamic, prepare


def overrides(model: onnx.ModelProto, task: Job) -> dict[str, Any]:
    """TensorQuantOverrides: the types of all tensors with other than 8 bits."""
    from onnxruntime.quantization import QuantType

    names, bits = policy(model, task), task.weight_bits
    weights = {4: QuantType.QInt4, 8: QuantType.QInt8}
    inputs = {4: QuantType.QUInt4, 8: QuantType.QUInt8}
    found = {name: [{"quant_type": weights[bits], "axis": axis(model, name)}] for name in names.few_weights}
    activations = {name: [{"quant_type": inputs[task.activation_bits]}] for name in names.few_inputs}
    return {**({} if bits == 8 else found), **({} if task.activation_bits == 8 else activations)}


def axis(model: onnx.ModelProto, weight: str) -> int:
    """The axis of the output channels."""
    node = next(node for node in model.graph.node if weight in node.input)
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if any(entry.name == "transB" and entry.i for entry in node.attribute) else 1
    return -1 if node.op_type == "MatMul" else 1


def static(task: Job) -> None:
    """quantize_static after quant_pre_process."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        prepare(task.model, prepared)
        quantize_static(
            prepared,
            task.out,
            Feeds(task.feeds),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=getattr(CalibrationMethod, task.settings["method"]),
            extra_options={"TensorQuantOverrides": overrides(onnx.load(prepared), task)},
        )


def main() -> None:
    """Quantize one file."""
    task = job()
    if task.settings["method"] == "prepare":
        prepare(task.model, task.out)
    elif task.settings["method"] == "dynamic":
        ort_dynamic(task.model, task.out)
    else:
        static(task)


if __name__ == "__main__":
    main()
