"""The learned methods by the names that users give. Naming one costs nothing; making one imports PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping

from onnxq.errors import EnvironmentFault, UsageError
from onnxq.tune.job import Method

LEARNED: Mapping[str, str] = {
    "adaquant": "onnxq.tune.adaquant:AdaQuant",
    "adaround": "onnxq.tune.adaround:AdaRound",
    "repapq": "onnxq.tune.repapq:RepAPQ",
    "aquant": "onnxq.tune.aquant:AQuant",
}
"""Name -> module and class; the class takes `iterations` and `device`."""
MATCH_MOMENTS = ("aquant",)
"""Methods that match moments themselves; matched again behind them, their borders would be undone."""


def learned_method(name: str, *, iterations: int, device: str = "cpu") -> Method:
    """The method called `name`, with its own defaults for everything else.

    Args:
        name: One of `LEARNED`.
        iterations: Steps per block.
        device: As torch knows it ("cpu", "cuda", "cuda:1"); see `find_device`.

    Raises:
        EnvironmentFault: PyTorch is not installed.
    """
    require_torch(f"the reconstruction {name!r}")
    module, _, kind = LEARNED[name].partition(":")
    method: Method = getattr(importlib.import_module(module), kind)(iterations=iterations, device=device)
    return method


def require_torch(what: str) -> None:
    """Refuse where PyTorch is missing.

    Args:
        what: Needs it; begins the message.

    Raises:
        EnvironmentFault: It is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise EnvironmentFault(f"{what} needs PyTorch, which is not installed: pip install 'onnxq[learn]'.")


def find_device(name: str) -> str:
    """The device that torch computes on.

    Args:
        name: "auto" (a CUDA device where torch has one, else the CPU), "cpu", "cuda" or "cuda:N".

    Raises:
        UsageError: No such kind of device.
        EnvironmentFault: This torch has no such device, or there is no torch.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda") or (number and not number.isdigit()):
        raise UsageError(f"device takes auto, cpu, cuda or cuda:N, not {name!r}.")
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise EnvironmentFault(f"this PyTorch sees no device {name!r}; use --device cpu.")
    return name
