"""AMD Quark: `with_quark.py MODEL FEEDS OUT JSON`; settings: method (its calibration method)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from quark.onnx import CalibMethod, ModelQuantizer, QConfig, QLayerConfig
from quark.onnx.quantization.config.spec import Int8Spec, QuantGranularity, UInt8Spec
from shared import Feed, batches, job


class Reader:
    """Its calibration reader: batch by batch, None at the end."""

    def __init__(self, folder: Path) -> None:
        """Read a folder."""
        self._folder = folder
        self._feeds: Iterator[Feed] = batches(folder)

    def get_next(self) -> Feed | None:
        """The next batch."""
        return next(self._feeds, None)

    def reset_iter(self) -> None:
        """Begin again."""
        self._feeds = batches(self._folder)


def main() -> None:
    """Quantize one file: QDQ, uint8 activations, int8 weights per channel, Concat and the like quantized too."""
    task = job()
    activation = UInt8Spec(calibration_method=CalibMethod[task.settings["method"]])
    weight = Int8Spec(calibration_method=CalibMethod.MinMax, quant_granularity=QuantGranularity.Channel)
    config = QConfig(QLayerConfig(activation=activation, weight=weight), ForceQuantizeNoInputCheck=True)
    ModelQuantizer(config).quantize_model(str(task.model), str(task.out), Reader(task.feeds))


if __name__ == "__main__":
    main()
