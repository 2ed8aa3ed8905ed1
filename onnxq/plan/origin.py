"""Where a plan came from: what it takes, besides the plan, to make the same file again, or one for another target."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from onnxq import graph
from onnxq.errors import EnvironmentFault, InputError
from onnxq.hints import did_you_mean
from onnxq.plan.file import plan_from_json, plan_to_json
from onnxq.types import QuantPlan

KINDS: Mapping[str, type] = {
    "model": str, "sha256": str, "simplified": bool, "rewritten": bool, "without": list, "equalize": bool,
    "migrations": dict, "packed": bool, "learned": bool, "metadata": dict,
}  # fmt: skip


@dataclass(frozen=True)
class Origin:
    """The float model of a plan and what was done to it.

    Attributes:
        model: Path of the float file, from the plan's folder.
        sha256: Of that file.
        simplified: Whether the simplifier's result was used.
        rewritten: Whether the rewrites were.
        without: Rewrites that were left out.
        equalize: Whether channels of neighbouring layers were equalised.
        migrations: Tensor -> ratios, shifts, scale and zero point of the scales that moved from what makes it.
        packed: Whether weights of few bits are stored packed.
        learned: Whether codes and biases lie beside the plan.
        metadata: What the quantized file says about itself.
        ranges: (smallest, largest) of float tensors; of all of them where the plan was kept for other targets.
    """

    model: str
    sha256: str
    simplified: bool
    rewritten: bool
    without: tuple[str, ...]
    equalize: bool
    migrations: Mapping[str, Mapping[str, Any]]
    packed: bool
    learned: bool
    metadata: Mapping[str, str]
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def save_with_origin(plan: QuantPlan, origin: Origin, path: Path) -> None:
    """Write a plan file that can be emitted again, whole or not at all; `EnvironmentFault` when that cannot be done."""
    extra = asdict(origin)
    ranges = {name: list(ends) for name, ends in extra.pop("ranges").items()}
    text = plan_to_json(plan, {"origin": extra, "ranges": ranges})
    try:
        with graph.atomic_path(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"{path} cannot be written: {error.strerror or error}.") from error


def load_with_origin(path: Path) -> tuple[QuantPlan, Origin]:
    """Read a plan file and where the plan came from.

    Raises:
        InputError: It is no plan file, or says nothing about its origin.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    plan = plan_from_json(text, path.name)
    document = json.loads(text)
    given = document.get("origin")
    if given is None:
        raise InputError(f"{path.name} does not say which model it is for: quantize --save-plan writes one that does.")
    return plan, _origin(given, document.get("ranges", {}), path.name)


def _origin(given: Any, ranges: Any, where: str) -> Origin:
    if not isinstance(given, dict) or not isinstance(ranges, dict):
        raise InputError(f"{where}: origin and ranges must be objects.")
    known = [entry.name for entry in fields(Origin) if entry.name != "ranges"]
    for key in given:
        if key not in known:
            raise InputError(f"{where}: origin: unknown key {key!r}.{did_you_mean(key, known)}")
    for key in known:
        if key not in given:
            raise InputError(f"{where}: origin lacks the key {key!r}.")
        if type(given[key]) is not KINDS[key]:
            raise InputError(f"{where}: origin: {key} holds a value of the wrong kind: {given[key]!r}.")
    return Origin(
        **{**given, "without": tuple(given["without"])},
        ranges={name: _ends(value, f"{where}: range of {name}") for name, value in ranges.items()},
    )


def _ends(value: Any, where: str) -> tuple[float, float]:
    numbers = isinstance(value, list) and len(value) == 2 and all(isinstance(end, int | float) for end in value)
    if not numbers or not np.isfinite(value).all() or value[0] > value[1]:
        raise InputError(f"{where}: it must be two numbers, the smaller one first.")
    return float(value[0]), float(value[1])
