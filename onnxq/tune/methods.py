"""The learned methods by the names that users give. Naming one costs nothing; making one imports PyTorch."""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import Protocol

from onnxq.errors import EnvironmentFault, UsageError
from onnxq.tune.job import Job, Method
from onnxq.types import Tuned


class Tuner(Protocol):
    """A way of one's own to find better codes, steps, grids or biases for a block."""

    def __call__(self, job: Job, tuned: Tuned, *, iterations: int, device: str) -> Tuned:
        """`tuned` with the entries of the block's layers and tensors replaced.

        Args:
            job: The block: its float graph, what goes in, what should come out.
            tuned: Grids and codes so far, of the whole network.
            iterations: The recipe's steps per block.
            device: Where to compute: "cpu", "cuda", "cuda:N".

        Raises:
            UnsupportedError: It cannot work on this block, which then stays as it is.
        """
        ...


LEARNED: dict[str, str | Tuner] = {
    "adaquant": "onnxq.tune.adaquant:AdaQuant",
    "adaround": "onnxq.tune.adaround:AdaRound",
    "repapq": "onnxq.tune.repapq:RepAPQ",
    "aquant": "onnxq.tune.aquant:AQuant",
}
"""Name -> module and class, which takes `iterations` and `device`; or what `register_tuner` was given."""
OWN = frozenset(LEARNED)
MATCH_MOMENTS = ("aquant",)
"""Methods that match moments themselves; matched again behind them, their borders would be undone."""


@dataclass(frozen=True)
class Registered:
    """A registered tuner as a method; see `Method`."""

    name: str
    tuner: Tuner
    iterations: int
    device: str
    judged: bool = True

    def __call__(self, job: Job, tuned: Tuned) -> Tuned:
        """What the tuner finds for a block."""
        return self.tuner(job, tuned, iterations=self.iterations, device=self.device)


def register_tuner(name: str, tuner: Tuner) -> None:
    """Make a tuner of one's own known to recipes: `reconstruction = "NAME"`.

    It is called for one block after the other, each behind what is tuned already, and its result is dropped where it
    does not bring the block's outputs nearer to the float network's.

    Args:
        name: Replaces an earlier tuner of that name, but none of the package's own.
        tuner: A function of the module's top level, if the recipe's unit is "parallel": it goes to other processes.

    Raises:
        UsageError: The name is one of the package's own.
    """
    if name in OWN or name == "none":
        raise UsageError(f"the reconstruction {name!r} is one of onnxq's own; take another name.")
    LEARNED[name] = tuner


def needs_torch(name: str) -> bool:
    """Whether a reconstruction learns with PyTorch: all of the package's own do, registered ones see to it."""
    return name in OWN


def learned_method(name: str, *, iterations: int, device: str = "cpu") -> Method:
    """The method called `name`, with its own defaults for everything else.

    Args:
        name: One of `LEARNED`.
        iterations: Steps per block.
        device: As torch knows it ("cpu", "cuda", "cuda:1"); see `find_device`.

    Raises:
        EnvironmentFault: PyTorch is not installed.
    """
    known = LEARNED[name]
    if not isinstance(known, str):
        return Registered(name, known, iterations, device)
    require_torch(f"the reconstruction {name!r}")
    module, _, kind = known.partition(":")
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
