"""What a sweep over models and recipes gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Swept:
    """One model by one recipe.

    Attributes:
        model: The float file, as it was given.
        recipe: Name of the recipe: a preset's, or that of a TOML file without its ending.
        document: What `onnxq quantize --json` would print; None for a job that failed.
        error: Why it failed; "" where it did not.
        exit_code: What `onnxq quantize` would have returned.
        known: An earlier run of the sweep had done it.
    """

    model: str
    recipe: str
    document: Mapping[str, Any] | None
    error: str = ""
    exit_code: int = 0
    known: bool = False
