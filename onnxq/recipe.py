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

from onnxq import passes
from onnxq.calibrate.ranges import RULES
from onnxq.errors import InputError, UsageError
from onnxq.plan.attention import FEW_BITS, SOFTMAXES
from onnxq.plan.budgets import Wishes, read_wishes
from onnxq.tune.methods import LEARNED
from onnxq.types.target import TARGET_NAMES

TARGETS = TARGET_NAMES
PRESET_NAMES = ("fast", "balanced", "light", "advanced", "accurate", "repapq", "aquant", "repq-vit", "fastest")
RECONSTRUCTIONS = ("none", *LEARNED)
UNITS = ("block", "layer", "parallel")
PLACEMENTS = ("auto", "rules", "measured")
ATTENTIONS = ("float", "auto", *map(str, range(2, 9)))
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "preset": PRESET_NAMES,
    "target": TARGETS,
    "placement": PLACEMENTS,
    "ranges": ("auto", *RULES),
    "reconstruction": RECONSTRUCTIONS,
    "unit": UNITS,
    "attention": ATTENTIONS,
    "softmax": SOFTMAXES,
}
_KINDS = {str: "a string", int: "a whole number", bool: "true or false", tuple: "a list of strings"}


@dataclass(frozen=True)
class Recipe:
    """What to do to a model; the defaults are the preset `balanced`.

    Attributes:
        preset: The preset this recipe started from.
        target: What the file is for, which decides its grids (docs/targets.md): "auto" (this machine), "cpu" (any x86
            with VNNI, or ARM), "tensorrt", "cuda", "openvino", "qnn" or "web".
        placement: Where nodes run: by the "rules" of the target, by what is "measured" to be faster here, or "auto":
            measured where the rules' network is slower than the float file.
        threads: Intra-op threads that latency is measured with.
        ranges: A rule of `RULES`, or "auto": per tensor the rule that hurts the model's outputs least.
        weight_bits: Bits of the weights of all layers but the first and last.
        activation_bits: Bits of the inputs of all layers but the first and last; fewer than 8 are emulated, and CPUs
            compute layers of 16 in float.
        first_last: Bits of the first and last layer.
        residual_bits: Bits of tensors that only feed sums or move.
        per_channel: One weight step per output channel instead of one per tensor.
        portable: Give 7-bit weights to layers that would saturate on x86 processors without VNNI.
        keep_float: Glob patterns of node names that must stay in float.
        reconstruction: A learned method of `LEARNED` that finds weight codes, steps and biases, or "none".
        unit: What it takes at a time: "block" or "layer", one after the other, each behind what is tuned already; or
            "parallel", all layers at once from the float network's tensors.
        iterations: Its steps per unit.
        bn_tuning: Put mean and spread of every layer's result back to the float model's, if that helps.
        bias_tuning: Learn all biases together from the float model's outputs.
        migrate_norms: Move channel scales from behind a normalisation into the linear layers that read it, where that
            makes their results more exact.
        attention: Bits of queries, keys, values and probabilities where attention multiplies them; "float", or "auto":
            `activation_bits` up to 6, else float, which is faster and more exact.
        softmax: Grid of the probabilities: "uniform", "log-sqrt2", "log2", or "auto": logarithmic up to 6 bits.
        max_size: Budget of the file: "0.15x" of the float file, "2MB"; "" for none. Budgets decide the bits of every
            layer, the first and the last one included.
        avg_bits: Budget of bits per weight on average, such as "4".
        max_latency: Budget of the time of a run: "0.6x" of the float model's, "1.5ms".
        max_drop: Share of the metric that may be lost, such as "0.005"; what costs more stays in float.
        max_bops: Budget of bit operations: "0.3x" of the 8-bit network's.
        max_cost: Budget by a vendor's table: "table.csv=1200".
        packed: Store weights of up to 6 bits packed; the runtime unpacks them when it loads the file.
        without: Names of rewrites to leave out.
        samples: Most calibration rows to use.
        seed: Of everything random.
    """

    preset: str = "balanced"
    target: str = "auto"
    placement: str = "auto"
    threads: int = 1
    ranges: str = "auto"
    weight_bits: int = 8
    activation_bits: int = 8
    first_last: int = 8
    residual_bits: int = 8
    per_channel: bool = True
    portable: bool = False
    keep_float: tuple[str, ...] = ()
    reconstruction: str = "none"
    unit: str = "block"
    iterations: int = 300
    bn_tuning: bool = True
    bias_tuning: bool = False
    migrate_norms: bool = False
    attention: str = "float"
    softmax: str = "auto"
    max_size: str = ""
    avg_bits: str = ""
    max_latency: str = ""
    max_drop: str = ""
    max_bops: str = ""
    max_cost: str = ""
    packed: bool = True
    without: tuple[str, ...] = ()
    samples: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values of the wrong type or outside their range.

        Raises:
            UsageError: Names the field and what it takes.
        """
        for entry in fields(self):
            value = getattr(self, entry.name)
            if type(value) is not type(entry.default) or not all(isinstance(part, str) for part in _parts(value)):
                raise UsageError(f"{_shown(entry.name)} takes {_KINDS[type(entry.default)]}, not {value!r}.")
        for name, wide in (
            ("weight_bits", ()),
            ("activation_bits", (16,)),
            ("first_last", ()),
            ("residual_bits", (16,)),
        ):
            if getattr(self, name) not in (*range(2, 9), *wide):
                takes = "2 to 8 or 16" if wide else "2 to 8"
                raise UsageError(f"{_shown(name)} takes {takes}, not {getattr(self, name)}.")
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                word = getattr(self, name)
                raise UsageError(f"{name} takes {', '.join(known)}, not {word!r}.{_near(word, known)}")
        passes.require_known(self.without)
        if self.wishes and self.attention_bits:
            raise UsageError("budgets leave the products of attention in float: take attention = float.")
        for name, least in (("samples", 1), ("iterations", 1), ("seed", 0), ("threads", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} takes {least} or more, not {getattr(self, name)}.")

    @property
    def attention_bits(self) -> int:
        """Bits of the operands of attention's products; 0 for float."""
        if self.attention == "auto":
            return self.activation_bits if self.activation_bits <= FEW_BITS else 0
        return 0 if self.attention == "float" else int(self.attention)

    @property
    def wishes(self) -> Wishes:
        """The budgets as numbers."""
        names = ("max_size", "avg_bits", "max_latency", "max_drop", "max_bops", "max_cost")
        return read_wishes(**{name: getattr(self, name) or None for name in names})


def _parts(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else ()


def _shown(name: str) -> str:
    """A field as the command line spells it."""
    return name.replace("_", "-")


FAST = Recipe(preset="fast", ranges="minmax", bn_tuning=False)
BALANCED = Recipe()
LIGHT = Recipe(preset="light")
ADVANCED = Recipe(preset="advanced", reconstruction="adaquant", bias_tuning=True)
ACCURATE = replace(ADVANCED, preset="accurate", iterations=1000, samples=2048)
REPAPQ = Recipe(preset="repapq", reconstruction="repapq")
AQUANT = Recipe(preset="aquant", reconstruction="aquant")
REPQ_VIT = Recipe(preset="repq-vit", bn_tuning=False, migrate_norms=True, attention="auto")
FASTEST = Recipe(preset="fastest", placement="measured")
PRESETS: Mapping[str, Recipe] = {
    recipe.preset: recipe for recipe in (FAST, BALANCED, LIGHT, ADVANCED, ACCURATE, REPAPQ, AQUANT, REPQ_VIT, FASTEST)
}


def resolve(recipe: Recipe | str | Path | None = None, **changes: Any) -> Recipe:
    """A recipe from a preset's name, a TOML file or a recipe, with single fields replaced.

    Args:
        recipe: What to start from; the preset `balanced` by default.
        **changes: Values by field; None keeps the field as it is.

    Raises:
        UsageError: No such preset or field, or a value outside its range.
        InputError: The file cannot be read, holds unknown keys or such values.
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
    known = [entry.name for entry in fields(Recipe)]
    for key in changes:
        if key not in known:
            raise UsageError(f"a recipe has no field {key!r}.{_near(key, known)}")
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
    return replace(found, **{key: value for key, value in given.items() if value is not None})


def load_recipe(path: Path) -> Recipe:
    """Read a TOML recipe; keys it leaves out come from its preset.

    Raises:
        InputError: It cannot be read, is not TOML, or holds unknown keys or values outside their range.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"recipe {path} is not TOML: {error}") from error
    known = {entry.name for entry in fields(Recipe)}
    for key in table:
        if key not in known:
            raise InputError(f"recipe {path}: unknown key {key!r}.{_near(key, known)}")
    try:
        return resolve(PRESETS.get(str(table.get("preset"))), **table)
    except UsageError as error:
        raise InputError(f"recipe {path}: {error}") from error


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML; `load_recipe` gives the same value back."""
    return "".join(f"{key} = {_toml(value)}\n" for key, value in asdict(recipe).items())


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _near(word: object, known: Any) -> str:
    near = difflib.get_close_matches(str(word), list(known), n=1)
    return f" Did you mean {near[0]!r}?" if near else ""
