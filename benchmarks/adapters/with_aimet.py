"""AIMET-ONNX: `with_aimet.py MODEL FEEDS OUT JSON`; settings: scheme, adaround (steps per layer, 0: none).

BatchNormalization is folded with its own function, weights are per channel, the file is its QDQ export with codes.
"""

from __future__ import annotations

import onnx
from aimet_onnx import QuantizationSimModel, apply_adaround
from aimet_onnx.batch_norm_fold import fold_all_batch_norms_to_weight
from shared import batches, job, policy, save


def main() -> None:
    """Quantize one file."""
    task = job()
    model = onnx.load(task.model)
    fold_all_batch_norms_to_weight(model)
    bits = policy(model, task)
    feeds = list(batches(task.feeds))
    sim = QuantizationSimModel(
        model,
        param_type=f"int{task.weight_bits}",
        activation_type="int8",
        quant_scheme=task.settings["scheme"],
    )
    sim.set_tensor_precision(list(bits.few_inputs), f"int{task.activation_bits}", strict=False)
    sim.set_tensor_precision([*bits.end_weights, *bits.end_inputs], f"int{task.first_last or 8}", strict=False)
    if steps := task.settings["adaround"]:
        apply_adaround(sim, feeds, num_iterations=steps)
    sim.compute_encodings(feeds)
    save(sim.to_onnx_qdq(prequantize_constants=True, export_int32_bias=True), task)


if __name__ == "__main__":
    main()
