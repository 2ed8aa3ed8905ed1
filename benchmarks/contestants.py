"""Who takes part in `field.py`: onnxq's presets and the rivals, each with its best documented settings."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rival_environments import python

ADAPTERS = Path(__file__).resolve().parent / "adapters"
OURS = "onnxq-"


@dataclass(frozen=True)
class Contestant:
    """One quantizer with its settings.

    Attributes:
        environment: Of `rival_environments.py`; "" is the one that measures.
        script: Of `adapters/`; "" is onnxq's command line.
        settings: Handed to the script as JSON, or to onnxq as options.
        bits: What it can write an ONNX file of.
        prepared: Whether it reads the float file after onnxruntime's quant_pre_process, which folds
            BatchNormalization: for quantizers that do not fold it themselves.
    """

    environment: str = ""
    script: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    bits: Sequence[str] = ("W8A8",)
    prepared: bool = False


FEW = ("W8A8", "W4A8", "W4A4")
LOWER = ("W6A6", "W2A4")
ORT, AIMET = "with_onnxruntime", "with_aimet"
CONTESTANTS: Mapping[str, Contestant] = {
    "onnxq-balanced": Contestant(settings={"preset": "balanced"}, bits=(*FEW, *LOWER)),
    "onnxq-light": Contestant(settings={"preset": "light"}, bits=(*FEW, *LOWER)),
    "onnxq-advanced": Contestant(settings={"preset": "advanced"}, bits=(*FEW, *LOWER)),
    "ort-minmax": Contestant(script=ORT, settings={"method": "MinMax"}, bits=FEW),
    "ort-percentile": Contestant(script=ORT, settings={"method": "Percentile"}, bits=FEW),
    "ort-dynamic": Contestant(script=ORT, settings={"method": "dynamic"}),
    "aimet": Contestant("aimet", AIMET, {"scheme": "tf_enhanced", "adaround": 0}, FEW),
    "aimet-adaround": Contestant("aimet", AIMET, {"scheme": "tf_enhanced", "adaround": 1000}, FEW[1:]),
    "nncf": Contestant("nncf", "with_nncf", {"bias_correction": True, "minmax": False}, prepared=True),
    "nncf-minmax": Contestant("nncf", "with_nncf", {"bias_correction": False, "minmax": True}, prepared=True),
    "quark": Contestant("quark", "with_quark", {"method": "Percentile"}),
    "inc": Contestant("inc", "with_inc", {"algorithm": "minmax"}),
    "inc-percentile": Contestant("inc", "with_inc", {"algorithm": "percentile"}),
    "modelopt": Contestant("modelopt", "with_modelopt", {"method": "max"}, prepared=True),
    "modelopt-entropy": Contestant("modelopt", "with_modelopt", {"method": "entropy"}, prepared=True),
    "espppq": Contestant("espppq", "with_espppq", {"calibration": "mse"}),
}


def split(bits: str) -> tuple[int, int]:
    """Weight and activation bits of a name such as "W4A8"; a ValueError for others."""
    found = re.fullmatch(r"W([2-8])A([2-8])", bits)
    if not found:
        raise ValueError(f"bits are written as W4A8, not {bits!r}")
    return int(found[1]), int(found[2])


def command(name: str, bits: str, first_last: str, paths: tuple[Path, Path, Path], folder: Path | None) -> list[str]:
    """The argument list that makes a contestant write the last of `paths`: model, feeds, result.

    `folder` holds the environments; `first_last` is "8" or "same". onnxq's may read a `recipe` beside the result.
    """
    who = CONTESTANTS[name]
    weights, activations = split(bits)
    model, feeds, out = (str(path) for path in paths)
    if not who.script:
        return [sys.executable, *_onnxq(who, bits, first_last, paths[2]), model, "--data", feeds, "-o", out]
    ends = int(first_last) if first_last != "same" and bits != "W8A8" else None
    policy = {"weight_bits": weights, "activation_bits": activations, "first_last": ends}
    script = ADAPTERS / f"{who.script}.py"
    interpreter = str(python(folder, who.environment)) if who.environment and folder else sys.executable
    return [interpreter, str(script), model, feeds, out, json.dumps({**policy, **who.settings})]


def recipe(bits: str, preset: str) -> str:
    """The recipe of onnxq where the first and last layer have unlike bits for weights and inputs, as the others."""
    weights, activations = split(bits)
    table = f'[[layers]]\nop = "{{}}"\nweights.bits = {weights}\nactivations.bits = {activations}\n'
    return "\n".join([f'preset = "{preset}"\n', *(table.format(op) for op in ("Conv", "Gemm", "MatMul"))])


def _onnxq(who: Contestant, bits: str, first_last: str, out: Path) -> list[str]:
    weights, activations = split(bits)
    own = first_last == "same" and weights != activations
    argv = ["-m", "onnxq", "quantize", "--placement", "rules", "--no-timing", "--json"]
    argv += [] if own else ["--preset", who.settings["preset"]]
    argv += ["--weight-bits", str(weights), "--activation-bits", str(activations)]
    if own:
        return [*argv, "--recipe", str(out.with_suffix(".toml"))]  # which names the preset
    return [*argv, "--first-last", str(weights) if first_last == "same" else first_last]
