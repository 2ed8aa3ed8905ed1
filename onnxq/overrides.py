"""Settings of single layers: the `[[layers]]` tables of a recipe.

    [[layers]]
    match = "*/attn/*"          # glob of node names
    op = "MatMul"               # operator
    weights.bits = 8
    activations.bits = 8

A layer takes from every table that matches it what that table says; where two say different things, the later one
holds. Bits bring a layer back that an earlier table left in float.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from typing import Any

from onnxq.calibrate.ranges import RULES
from onnxq.errors import UsageError
from onnxq.hints import did_you_mean
from onnxq.plan.codebook import BITS

KEYS = {
    "match": "match",
    "op": "op",
    "weights.bits": "weight_bits",
    "weights.codebook": "codebook_bits",
    "activations.bits": "activation_bits",
    "float": "keep_float",
    "ranges": "ranges",
    "per_channel": "per_channel",
}
"""Key in a file -> field."""
_TAKES = {"str": (str, "a string"), "int": (int, "a whole number"), "bool": (bool, "true or false")}


@dataclass(frozen=True)
class Override:
    """What holds for some layers; None leaves what the rest of the recipe says.

    Attributes:
        match: Glob of node names, upper and lower case told apart; None for any name.
        op: Operator; None for any.
        weight_bits: Bits of the weights, 2 to 8.
        activation_bits: Bits of the input, 2 to 8 or 16. Where layers that read one tensor want different bits, the
            larger number holds.
        keep_float: Whether the nodes stay in float.
        ranges: The rule of `RULES` for the input's range.
        per_channel: One weight step per output channel, or one for the whole weight.
        codebook_bits: Bits of an index into a codebook, 1 to 4, in place of `weight_bits`.
    """

    match: str | None = None
    op: str | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    keep_float: bool | None = None
    ranges: str | None = None
    per_channel: bool | None = None
    codebook_bits: int | None = None

    def __post_init__(self) -> None:
        """Refuse values of the wrong type or outside their range, and tables that choose or say nothing.

        Raises:
            UsageError: Names the key and what it takes.
        """
        for key, value, kind in self._given():
            wanted, takes = _TAKES[kind.partition(" ")[0]]
            if type(value) is not wanted:
                raise UsageError(f"{self} takes {takes} for {key}, not {value!r}.")
        if self.match is None and self.op is None:
            raise UsageError(f"{self} chooses no layer: give match, a pattern of node names, or op, an operator.")
        if all(getattr(self, field.name) is None for field in fields(self)[2:]):
            raise UsageError(f"{self} says nothing about its layers; known keys: {', '.join(KEYS)}.")
        for key, bits, wide in (
            ("weights.bits", self.weight_bits, ()),
            ("activations.bits", self.activation_bits, (16,)),
        ):
            if bits is not None and bits not in (*range(2, 9), *wide):
                raise UsageError(f"{self} takes {'2 to 8 or 16' if wide else '2 to 8'} for {key}, not {bits}.")
        if self.codebook_bits is not None and self.codebook_bits not in BITS:
            raise UsageError(f"{self} takes 1 to 4 for weights.codebook, not {self.codebook_bits}.")
        if self.weight_bits is not None and self.codebook_bits is not None:
            raise UsageError(f"{self} gives weights.bits and weights.codebook; take one of them.")
        if self.ranges is not None and self.ranges not in RULES:
            hint = did_you_mean(self.ranges, RULES)
            raise UsageError(f"{self} takes {', '.join(RULES)} for ranges, not {self.ranges!r}.{hint}")
        if self.keep_float and self.has_bits:
            raise UsageError(f"{self} asks for float and for bits; take one of them.")

    def __str__(self) -> str:
        words = [f"{key} = {value!r}" for key, value, _ in self._given() if key in ("match", "op")]
        return f"[[layers]] {', '.join(words)}" if words else "[[layers]]"

    def _given(self) -> Iterator[tuple[str, Any, str]]:
        """(key, value, declared type) of what is given."""
        kinds = {field.name: str(field.type) for field in fields(self)}
        for key, name in KEYS.items():
            value = getattr(self, name)
            if value is not None:
                yield key, value, kinds[name]

    @property
    def has_bits(self) -> bool:
        """Whether it gives bits, which only layers in integers have."""
        return any(bits is not None for bits in (self.weight_bits, self.codebook_bits, self.activation_bits))

    def chooses(self, name: str, op_type: str) -> bool:
        """Whether a node is one of its layers."""
        return (self.match is None or fnmatchcase(name, self.match)) and self.op in (None, op_type)

    def over(self, earlier: Override) -> Override:
        """Both together; what this one says holds."""
        said = {field.name: getattr(self, field.name) for field in fields(self)[2:]}
        found = {name: value for name, value in said.items() if value is not None}
        if self.has_bits:
            found.setdefault("keep_float", False)
        if self.keep_float:
            found |= {"weight_bits": None, "codebook_bits": None, "activation_bits": None}
        if self.weight_bits is not None or self.codebook_bits is not None:
            found |= {"weight_bits": self.weight_bits, "codebook_bits": self.codebook_bits}
        return replace(earlier, **found)

    def table(self) -> dict[str, object]:
        """As a file holds it; `read_overrides` gives it back."""
        found: dict[str, Any] = {}
        for key, value, _ in self._given():
            outer, _, inner = key.partition(".")
            found[outer] = {inner: value} if inner else value
        return found

    def toml(self) -> str:
        """The same as TOML."""
        lines = (f"{key} = {toml_value(value)}\n" for key, value, _ in self._given())
        return "\n[[layers]]\n" + "".join(lines)


def toml_value(value: object) -> str:
    """A string, number, truth value or tuple of them as TOML."""
    if isinstance(value, tuple):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def read_overrides(tables: object) -> tuple[Override, ...]:
    """Overrides from the tables of a file; those that are overrides already stay as they are.

    Raises:
        UsageError: A key is unknown, or a value is not what it takes.
    """
    if not isinstance(tables, list | tuple):
        raise UsageError(f"layers takes a list of tables, not {tables!r}.")
    return tuple(_read(entry) for entry in tables)


def _read(entry: object) -> Override:
    if isinstance(entry, Override):
        return entry
    if not isinstance(entry, Mapping):
        raise UsageError(f"layers takes a list of tables, not one that holds {entry!r}.")
    given: dict[str, Any] = {}
    for key, value in _flat(entry):
        if key not in KEYS:
            raise UsageError(f"[[layers]] has no key {key!r}.{did_you_mean(key, KEYS)}")
        given[KEYS[key]] = value
    return Override(**given)


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", entry) for inner, entry in value.items())
        else:
            yield key, value


def settle(overrides: Sequence[Override], nodes: Mapping[str, str]) -> dict[str, Override]:
    """What holds for each node that some override chooses, by name.

    Args:
        overrides: In the order in which they were given.
        nodes: Operator by node name.
    """
    found: dict[str, Override] = {}
    for override in overrides:
        for name in chosen(override, nodes):
            found[name] = override.over(found.get(name, replace(override, match=name)))
    return found


def chosen(override: Override, nodes: Mapping[str, str]) -> Iterable[str]:
    """Names of the nodes that an override chooses."""
    return [name for name, op_type in nodes.items() if override.chooses(name, op_type)]
