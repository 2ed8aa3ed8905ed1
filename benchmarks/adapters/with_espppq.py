"""ESP-PPQ for onnxruntime: `with_espppq.py MODEL FEEDS OUT JSON`; settings: calibration (its name of a method)."""

from __future__ import annotations

import torch
from esp_ppq import QuantizationSettingFactory, TargetPlatform
from esp_ppq.api import export_ppq_graph, quantize_onnx_model
from shared import batches, job


def main() -> None:
    """Quantize one file of one input."""
    task = job()
    feeds = [torch.from_numpy(value) for feed in batches(task.feeds) for value in list(feed.values())[:1]]
    settings = QuantizationSettingFactory.default_setting()
    settings.quantize_activation_setting.calib_algorithm = task.settings["calibration"]
    graph = quantize_onnx_model(
        str(task.model),
        feeds,
        calib_steps=len(feeds),
        input_shape=list(feeds[0].shape),
        platform=TargetPlatform.ONNXRUNTIME,
        setting=settings,
        collate_fn=lambda batch: batch,
        device="cpu",
    )
    export_ppq_graph(graph, TargetPlatform.ONNXRUNTIME, str(task.out))


if __name__ == "__main__":
    main()
