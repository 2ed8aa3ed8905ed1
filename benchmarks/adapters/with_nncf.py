"""NNCF: `with_nncf.py MODEL FEEDS OUT JSON`; settings: bias_correction, minmax (not the mean of extremes)."""

from __future__ import annotations

import nncf
import onnx
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
from nncf.quantization.range_estimator import RangeEstimatorParameters, RangeEstimatorParametersSet
from shared import job, rows, save, transformer


def main() -> None:
    """Quantize one file: the mixed preset, for the CPU, without the fix for processors that lack VNNI."""
    task = job()
    model = onnx.load(task.model)
    feeds = list(rows(task.feeds))
    ranges = RangeEstimatorParametersSet.MINMAX if task.settings["minmax"] else RangeEstimatorParameters()
    quantized = nncf.quantize(
        model,
        nncf.Dataset(feeds),
        preset=nncf.QuantizationPreset.MIXED,
        target_device=nncf.TargetDevice.CPU,
        subset_size=len(feeds),
        model_type=nncf.ModelType.TRANSFORMER if transformer(model) else None,
        advanced_parameters=AdvancedQuantizationParameters(
            overflow_fix=OverflowFix.DISABLE,
            disable_bias_correction=not task.settings["bias_correction"],
            activations_range_estimator_params=ranges,
        ),
    )
    save(quantized, task)


if __name__ == "__main__":
    main()
