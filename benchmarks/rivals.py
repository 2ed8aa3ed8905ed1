"""The quantizers that are compared, each one command from a float model and its feeds to an int8 file.

    rivals.py ort-static|ort-static-percentile|ort-dynamic MODEL FEEDS OUT

onnxruntime's own quantizers run through this file as a script, so that their time and memory are their own.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
METHODS = {"ort-static": "MinMax", "ort-static-percentile": "Percentile"}
RIVALS = (*METHODS, "ort-dynamic")
QUANTIZERS = ("onnxq", *RIVALS)


def command(quantizer: str, model: Path, feeds: Path, out: Path) -> list[str]:
    """The argument list that makes `quantizer` write `out`."""
    if quantizer == "onnxq":
        argv = ["-m", "onnxq", "quantize", str(model), "--data", str(feeds), "-o", str(out), "--json"]
    else:
        argv = [str(Path(__file__).resolve()), quantizer, str(model), str(feeds), str(out)]
    return [sys.executable, *argv]


def environment() -> Mapping[str, str]:
    """This environment with the repository in front of the path, so that `-m onnxq` is this checkout."""
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{path}" if path else str(ROOT)}


def integer_coverage(document: object) -> float | None:
    """The first `integer_coverage` anywhere in a JSON document: a share, or an object that holds one."""
    if isinstance(document, list):
        found = (integer_coverage(item) for item in document)
        return next((value for value in found if value is not None), None)
    if not isinstance(document, dict):
        return None
    value = document.get("integer_coverage")
    if isinstance(value, dict):
        value = next((v for k, v in value.items() if k in ("share", "coverage", "macs")), None)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return integer_coverage(list(document.values()))


class Feeds:
    """The .npz batches of a folder, as a calibration reader of onnxruntime."""

    def __init__(self, folder: Path) -> None:
        """Read the batches of `folder` in the order of their names."""
        self._paths = iter(sorted(folder.glob("*.npz")))

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by input name; None after the last."""
        import numpy as np

        path = next(self._paths, None)
        if path is None:
            return None
        with np.load(path, allow_pickle=False) as batch:
            return {name: batch[name] for name in batch.files}


def ort_static(model: Path, feeds: Path, out: Path, method: str) -> None:
    """Static quantization of onnxruntime as its CPU kernels like it: QDQ, u8 activations, s8 channels."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        prepare(model, prepared)
        quantize_static(
            prepared,
            out,
            Feeds(feeds),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            calibrate_method=getattr(CalibrationMethod, method),
        )


def ort_dynamic(model: Path, out: Path) -> None:
    """Dynamic quantization of onnxruntime: weights in s8 per channel, activation ranges at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(model, out, weight_type=QuantType.QInt8, per_channel=True)


def prepare(model: Path, prepared: Path) -> None:
    """quant_pre_process; without its symbolic shape inference where that fails. It leaves files where it runs."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with contextlib.chdir(prepared.parent):
        try:
            quant_pre_process(str(model), str(prepared))
        except Exception as error:
            print(f"symbolic shape inference left out: {error}", file=sys.stderr)
            quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)


def main() -> None:
    """Run one of onnxruntime's quantizers."""
    quantizer, *paths = sys.argv[1:]
    model, feeds, out = (Path(path) for path in paths)
    if quantizer == "ort-dynamic":
        ort_dynamic(model, out)
    else:
        ort_static(model, feeds, out, METHODS[quantizer])


if __name__ == "__main__":
    main()
