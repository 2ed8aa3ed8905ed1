"""Recipes: everything that decides what a run does, as one flat value that saves to TOML.

Precedence: command line, then recipe file, then preset. Unknown keys are errors.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from onnxq import graph, passes
from onnxq.calibrate.ranges import RULES
from onnxq.errors import InputError, UsageError
from onnxq.hints import did_you_mean
from onnxq.overrides import Override, read_overrides, toml_value
from onnxq.plan.attention import FEW_BITS, SOFTMAXES
from onnxq.plan.budgets import Wishes, read_wishes
from onnxq.plan.codebook import BITS
from onnxq.tune.methods import LEARNED
from onnxq.types.target import TARGET_NAMES

TARGETS = TARGET_NAMES
PRESET_NAMES = ("fast", "balanced", "light", "advanced", "accurate", "repapq", "aquant", "repq-vit", "fastest")
UNITS = ("block", "layer", "parallel")
PLACEMENTS = ("auto", "rules", "measured")
ATTENTIONS = ("float", "auto", *map(str, range(2, 9)))
_KINDS = {str: "a string", int: "a whole number", bool: "true or false", tuple: "a list of strings"}
_SHORT = re.compile(r"w(\d+)(?:a(\d+))?")
"""Bits as people write them: "w4a8", "w4"."""


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
        codebook_bits: Bits of an index into a codebook, 1 to 4, in place of `weight_bits`; 0 for none.
        activation_bits: Bits of the inputs of all layers but the first and last; fewer than 8 are emulated, and CPUs
            compute layers of 16 in float.
        first_last: Bits of the first and last layer.
        residual_bits: Bits of tensors that only feed sums or move.
        weight_only: Store the weights of MatMuls in blocks of 4 or 8 bits and leave everything else in float, for
            products of few rows.
        per_channel: One weight step per output channel instead of one per tensor.
        portable: Give 7-bit weights to layers that would saturate on x86 processors without VNNI.
        keep_float: Glob patterns of node names that must stay in float.
        reconstruction: A learned method of `LEARNED` that finds weight codes, steps and biases, or "none".
        unit: What it takes at a time: "block" or "layer", one after the other, each behind what is tuned already; or
            "parallel", all layers at once from the float network's tensors.
        iterations: Its steps per unit.
        bn_tuning: Put mean and spread of every layer's result back to the float model's, if that helps.
        bias_tuning: Learn all biases together from the float model's outputs.
        migrate_norms: Move channel scales from behind a normalisation, and those of loud channels from behind a layer,
            into the layers that read them, where that makes their results more exact.
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
        layers: Settings of single layers, which hold before all of the above but `keep_float`; of two that contradict
            each other, the later one holds.
    """

    preset: str = "balanced"
    target: str = "auto"
    placement: str = "auto"
    threads: int = 1
    ranges: str = "auto"
    weight_bits: int = 8
    codebook_bits: int = 0
    activation_bits: int = 8
    first_last: int = 8
    residual_bits: int = 8
    weight_only: bool = False
    per_channel: bool = True
    portable: bool = False
    keep_float: tuple[str, ...] = ()
    reconstruction: str = "none"
    unit: str = "block"
    iterations: int = 300
    bn_tuning: bool = True
    bias_tuning: bool = False
    migrate_norms: bool = True
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
    layers: tuple[Override, ...] = ()

    def __post_init__(self) -> None:
        """Refuse values of the wrong type or outside their range.

        Raises:
            UsageError: Names the field and what it takes.
        """
        for entry in fields(self):
            value, part_kind = getattr(self, entry.name), Override if entry.name == "layers" else str
            if type(value) is not type(entry.default) or not all(isinstance(part, part_kind) for part in _parts(value)):
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
        if self.codebook_bits not in (0, *BITS):
            raise UsageError(f"codebook-bits takes 1 to 4, or 0 for none, not {self.codebook_bits}.")
        for name, known in _choices().items():
            if getattr(self, name) not in known:
                word = getattr(self, name)
                raise UsageError(f"{name} takes {', '.join(known)}, not {word!r}.{did_you_mean(word, known)}")
        passes.require_known(self.without)
        if self.wishes and self.attention_bits:
            raise UsageError("budgets leave the products of attention in float: take attention = float.")
        if self.wishes and any(layer.has_bits for layer in self.layers):
            raise UsageError("budgets decide the bits of every layer: [[layers]] can keep layers in float, no more.")
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


def _choices() -> Mapping[str, tuple[str, ...]]:
    """What fields that are words take; rules and methods may have been registered."""
    return {
        "preset": PRESET_NAMES,
        "target": TARGETS,
        "placement": PLACEMENTS,
        "ranges": ("auto", *RULES),
        "reconstruction": ("none", *LEARNED),
        "unit": UNITS,
        "attention": ATTENTIONS,
        "softmax": SOFTMAXES,
    }


def _parts(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else ()


def _shown(name: str) -> str:
    """A field as the command line spells it."""
    return name.replace("_", "-")


FAST = Recipe(preset="fast", ranges="minmax", bn_tuning=False, migrate_norms=False)
BALANCED = Recipe()
LIGHT = Recipe(preset="light")
ADVANCED = Recipe(preset="advanced", reconstruction="adaquant", bias_tuning=True)
ACCURATE = replace(ADVANCED, preset="accurate", iterations=1000, samples=2048)
REPAPQ = Recipe(preset="repapq", reconstruction="repapq")
AQUANT = Recipe(preset="aquant", reconstruction="aquant")
REPQ_VIT = Recipe(preset="repq-vit", bn_tuning=False, attention="auto")
FASTEST = Recipe(preset="fastest", placement="measured", migrate_norms=False)
PRESETS: Mapping[str, Recipe] = {
    recipe.preset: recipe for recipe in (FAST, BALANCED, LIGHT, ADVANCED, ACCURATE, REPAPQ, AQUANT, REPQ_VIT, FASTEST)
}


def resolve(recipe: Recipe | str | Path | None = None, **changes: Any) -> Recipe:
    """A recipe from a preset's name, bits, a file or a recipe, with single fields replaced.

    Args:
        recipe: What to start from; the preset `balanced` by default. A file is TOML, or an ONNX file that a run wrote.
            Bits are written "w4a8" or "w4" (8 for the inputs), and mean `balanced` with them.
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
    elif bits := _SHORT.fullmatch(str(recipe)):
        found = replace(BALANCED, weight_bits=int(bits[1]), activation_bits=int(bits[2] or 8))
    elif str(recipe).endswith((".toml", ".onnx")):
        found = load_recipe(Path(recipe))
    else:
        near = did_you_mean(recipe, PRESETS)
        raise UsageError(f"there is no preset {str(recipe)!r}; presets: {', '.join(PRESETS)}; or bits: w4a8.{near}")
    known = [entry.name for entry in fields(Recipe)]
    for key in changes:
        if key not in known:
            raise UsageError(f"a recipe has no field {key!r}.{did_you_mean(key, known)}")
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in changes.items()}
    if given.get("layers") is not None:
        given["layers"] = read_overrides(given["layers"])
    return replace(found, **{key: value for key, value in given.items() if value is not None})


def load_recipe(path: Path) -> Recipe:
    """Read a TOML recipe, or the one that a quantized file records; keys it leaves out come from its preset.

    Raises:
        InputError: It cannot be read, is not TOML, or holds unknown keys or values outside their range.
    """
    table = _recorded(path) if path.suffix == ".onnx" else _read(path)
    known = [entry.name for entry in fields(Recipe)]
    for key in table:
        if key not in known:
            raise InputError(f"recipe {path}: unknown key {key!r}.{did_you_mean(key, known)}")
    try:
        return resolve(PRESETS.get(str(table.get("preset"))), **table)
    except UsageError as error:
        raise InputError(f"recipe {path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {path} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"recipe {path} is not TOML: {error}") from error


def _recorded(path: Path) -> dict[str, Any]:
    """The recipe in the metadata of a file that a run wrote."""
    text = graph.load(path).metadata_props.get("onnxq.recipe")
    try:
        table = json.loads(text or "null")
    except ValueError as error:
        raise InputError(f"the recipe that {path} records is damaged: {error}") from error
    if not isinstance(table, dict):
        raise InputError(f"{path} records no recipe: it was not written by onnxq.")
    return table


def plain(recipe: Recipe) -> dict[str, object]:
    """The recipe as values that JSON and TOML know; `resolve` takes them as changes."""
    return {**asdict(recipe), "layers": [layer.table() for layer in recipe.layers]}


def recipe_toml(recipe: Recipe) -> str:
    """The recipe as TOML; `load_recipe` gives the same value back."""
    table = {key: value for key, value in asdict(recipe).items() if key != "layers" or not recipe.layers}
    flat = "".join(f"{key} = {toml_value(value)}\n" for key, value in table.items())
    return flat + "".join(layer.toml() for layer in recipe.layers)
