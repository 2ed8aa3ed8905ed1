"""Quantize ONNX models so that they are small, fast in onnxruntime, and still right.

    import onnxq

    onnxq.quantize("model.onnx", "calibration/", "w4a8").save("model.int8.onnx")

Names are imported when first used, so that `import onnxq` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from onnxq.version import __version__

if TYPE_CHECKING:
    from onnxq.bench import measure as benchmark
    from onnxq.calibrate import Preprocess
    from onnxq.calibrate import register_rule as register_range_rule
    from onnxq.errors import OnnxqError
    from onnxq.graph import load
    from onnxq.overrides import Override
    from onnxq.passes import register_pass
    from onnxq.pipeline import (
        Checks,
        QuantizedModel,
        Workplace,
        evaluate,
        forget_progress,
        inspect,
        quantize,
        reparam,
        simplify,
    )
    from onnxq.recipe import PRESETS, Recipe
    from onnxq.tune.methods import register_tuner

_HOMES = {
    "PRESETS": "onnxq.recipe",
    "Checks": "onnxq.pipeline",
    "OnnxqError": "onnxq.errors",
    "Override": "onnxq.overrides",
    "Preprocess": "onnxq.calibrate",
    "QuantizedModel": "onnxq.pipeline",
    "Recipe": "onnxq.recipe",
    "Workplace": "onnxq.pipeline",
    "benchmark": "onnxq.bench:measure",
    "evaluate": "onnxq.pipeline",
    "forget_progress": "onnxq.pipeline",
    "inspect": "onnxq.pipeline",
    "load": "onnxq.graph",
    "quantize": "onnxq.pipeline",
    "register_pass": "onnxq.passes",
    "register_range_rule": "onnxq.calibrate:register_rule",
    "register_tuner": "onnxq.tune.methods",
    "reparam": "onnxq.pipeline",
    "simplify": "onnxq.pipeline",
}

__all__ = [
    "PRESETS",
    "Checks",
    "OnnxqError",
    "Override",
    "Preprocess",
    "QuantizedModel",
    "Recipe",
    "Workplace",
    "__version__",
    "benchmark",
    "evaluate",
    "forget_progress",
    "inspect",
    "load",
    "quantize",
    "register_pass",
    "register_range_rule",
    "register_tuner",
    "reparam",
    "simplify",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxq' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(importlib.import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted(__all__)
