"""NVIDIA ModelOpt: `with_modelopt.py MODEL FEEDS OUT JSON`; settings: method (max or entropy)."""

from __future__ import annotations

import numpy as np
from modelopt.onnx.quantization import quantize
from shared import batches, job


def main() -> None:
    """Quantize one file to int8; what is not quantized stays in float32."""
    task = job()
    feeds = list(batches(task.feeds))
    quantize(
        str(task.model),
        quantize_mode="int8",
        calibration_data={name: np.concatenate([feed[name] for feed in feeds]) for name in feeds[0]},
        calibration_method=task.settings["method"],
        calibration_eps=["cpu"],
        high_precision_dtype="fp32",
        output_path=str(task.out),
    )


if __name__ == "__main__":
    main()
