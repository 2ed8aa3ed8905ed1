"""Recipes: everything that decides what a run does, as one flat value that saves to TOML.

Precedence: command line, then recipe file, then preset. Unknown keys are errors.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from onnxq.calibrate.ranges import RULES
from onnxq.errors import InputError, UsageError

TARGETS = ("auto", "cpu")


@dataclass(frozen=True)
class Recipe:
    """What to do to a model; the defaults are the preset `balanced`.

    Attributes:
        preset: The preset this recipe started from.
        target: "auto" (this machine) or "cpu" (any x86 with VNNI, or ARM).
        ranges: A rule of `RULES`, or "auto": per tensor the rule that hurts the layers behind it least.
        weight_bits: Bits of the weights of all layers but the first and last.
        activation_bits: Bits of the inputs of all layers but the first and last; below 8 they are emulated.
        first_last: Bits of the first and last layer.
        residual_bits: Bits of tensors that only feed sums or move.
        per_channel: One weight step per output channel instead of one per tensor.
        portable: Give 7-bit weights to layers that would saturate on x86 processors without VNNI.
        keep_float: Glob patterns of node names that must stay in float.
        samples: Most calibration rows to use.
        seed: Of everything random.
    """

    preset: str = "balanced"
    target: str = "auto"
    ranges: str = "auto"
    weight_bits: int = 8
    activation_bits: int = 8
    first_last: int = 8
    residual_bits: int = 8
    per_channel: bool = True
    portable: bool = False
    keep_float: tuple[str, ...] = ()
    samples: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values outside their range.

        Raises:
            UsageError: Names the field and what it takes.
        """
        for name in ("weight_bits", "activation_bits", "first_last", "residual_bits"):
            bits = getattr(self, name)
            if not 2 <= bits <= 8:
                raise UsageError(f"{name.replace('_', '-')} takes 2 to 8, not {bits}.")
        if self.ranges != "auto" and self.ranges not in RULES:
            raise UsageError(f"ranges takes auto, {', '.join(RULES)}, not {self.ranges!r}.{_near(self.ranges, RULES)}")
        if self.target not in TARGETS:
            raise UsageError(f"target takes {', '.join(TARGETS)}, not {self.target!r}.{_near(self.target, TARGETS)}")
        if self.samples < 1:
            raise UsageError(f"samples takes 1 or more, not {self.samples}.")


FAST = Recipe(preset="fast", ranges="minmax")
BALANCED = Recipe()
PRESETS: Mapping[str, Recipe] = {"fast": FAST, "balanced": BALANCED}


def resolve(recipe: Recipe | str | Path | None = None, **changes: Any) -> Recipe:
    """A recipe from a preset's name, a TOML file or a recipe, with single fields replaced.

    Raises:
        UsageError: No such preset, or a value outside its range.
        InputError: The file cannot be read or holds unknown keys.
    """
    if recipe is None:
        found = BALANCED
    elif isinstance(recipe, Recipe):
        found = recipe
    elif str(recipe) in PRESETS:
        found = PRESETS[str(recipe)]
    elif str(recipe).endswith(".toml"):
        found = load_recipe(Path(recipe))
    else:
        raise UsageError(f"there is no preset {str(recipe)!r}; presets: {', '.join(PRESETS)}.{_near(recipe, PRESETS)}")
    return replace(found, **{key: value for key, value in changes.items() if value is not None})


def load_recipe(path: Path) -> Recipe:
    """Read a TOML recipe; keys it leaves out come from its preset."""
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"recipe {path} is not TOML: {error}") from error
    known = {entry.name: entry for entry in fields(Recipe)}
    for key, value in table.items():
        if key not in known:
            raise InputError(f"recipe {path}: unknown key {key!r}.{_near(key, known)}")
        default = getattr(BALANCED, key)
        wanted = list if isinstance(default, tuple) else type(default)
        if type(value) is not wanted:
            raise InputError(f"recipe {path}: {key} takes a {wanted.__name__}, not {value!r}.")
    if "keep_float" in table:
        table["keep_float"] = tuple(str(pattern) for pattern in table["keep_float"])
    return resolve(table.get("preset", "balanced"), **table)


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML; `load_recipe` gives the same value back."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in asdict(recipe).items())


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(json.dumps(str(entry)) for entry in value) + "]"
    return json.dumps(value)


def _near(word: object, known: Any) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
