"""What to feed a model when measuring it: real rows where there are some, otherwise plausible ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxq.errors import DataError, UsageError
from onnxq.types import Array, Dim, Feeds, InputSpec

SEQUENCE = 128
"""Length of an axis whose name speaks of a sequence or a length."""
SPATIAL = 224
"""Height and width of an image input that leaves them open."""
IDS = 10
"""Random integers are below this: every embedding table has that many rows."""


def parse_shapes(texts: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Input shapes by name, from texts such as `input:1,3,224,224`; the name may itself hold colons.

    Raises:
        UsageError: A text has another form, or an input appears twice.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for text in texts:
        name, _, dims = text.rpartition(":")
        sizes = [part.strip() for part in dims.split(",")]
        if not name or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise UsageError(f"{text!r} is not a shape: write the input's name and its sizes, as in input:1,3,224,224.")
        if name in shapes:
            raise UsageError(f"the shape of input {name!r} is given twice.")
        shapes[name] = tuple(int(size) for size in sizes)
    return shapes


def merge_specs(specs: Mapping[str, Sequence[InputSpec]]) -> tuple[InputSpec, ...]:
    """The inputs that all models take: a size that any of them fixes is fixed.

    Args:
        specs: Inputs by model name.

    Raises:
        UsageError: The models do not take the same inputs.
    """
    (first, wanted), *others = specs.items()
    merged = {spec.name: spec for spec in wanted}
    for other, given in others:
        if {spec.name for spec in given} != set(merged):
            raise UsageError(
                f"{first} and {other} cannot be compared: their inputs are {_listed(merged)} and "
                f"{_listed(spec.name for spec in given)}."
            )
        for spec in given:
            merged[spec.name] = _merge(merged[spec.name], spec, first, other)
    return tuple(merged.values())


def _merge(mine: InputSpec, other: InputSpec, first: str, second: str) -> InputSpec:
    pairs = list(zip(mine.shape, other.shape, strict=False))
    clash = any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in pairs)
    if mine.rank != other.rank or mine.dtype != other.dtype or clash:
        raise UsageError(f"{first} and {second} cannot be compared: input {mine} of the one is {other} of the other.")
    return replace(mine, shape=tuple(b if isinstance(b, int) else a for a, b in pairs))


def fixed_batch(specs: Sequence[InputSpec]) -> int | None:
    """The number of rows that the inputs fix, None when it is free."""
    leading = next((spec.shape[0] for spec in specs if spec.rank), None)
    return leading if isinstance(leading, int) else None


def make_feeds(
    specs: Sequence[InputSpec],
    batch: int,
    *,
    shapes: Mapping[str, Sequence[int]] | None = None,
    feeds: Feeds | None = None,
    seed: int = 0,
) -> Feeds:
    """One batch of `batch` rows for a model with inputs `specs`.

    Args:
        specs: The model's inputs.
        batch: Size of every free first axis.
        shapes: Sizes of the other free axes, by input; a free first axis counts rows and is ignored here.
        feeds: Real rows; repeated or cut to the batch. Without them the values are random.
        seed: Of the random values.

    Raises:
        UsageError: A free axis has no size, or `shapes` does not fit the inputs.
        DataError: `feeds` lacks an input.
    """
    if feeds is not None:
        return {spec.name: _rows(spec, batch, feeds) for spec in specs}
    rng = np.random.default_rng(seed)
    resolved = _resolve(specs, batch, shapes or {})
    return {spec.name: _random(spec, resolved[spec.name], rng) for spec in specs}


def _rows(spec: InputSpec, batch: int, feeds: Feeds) -> Array:
    if spec.name not in feeds:
        raise DataError(f"the data has no input {spec.name!r}; it has {_listed(feeds)}.")
    array = np.asarray(feeds[spec.name])
    if not spec.rank or not array.ndim:
        return array
    if not len(array):
        raise DataError(f"the data has no rows for input {spec.name!r}.")
    leading = spec.shape[0]
    rows = leading if isinstance(leading, int) else batch
    return np.resize(array, (rows, *array.shape[1:]))


def _resolve(specs: Sequence[InputSpec], batch: int, shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    known = {spec.name: spec for spec in specs}
    symbols: dict[str, int] = {}
    for name, sizes in shapes.items():
        if name not in known:
            raise UsageError(f"there is no input {name!r}; the inputs are {_listed(known)}.")
        spec = known[name]
        if len(sizes) != spec.rank or any(
            isinstance(dim, int) and dim != size for dim, size in zip(spec.shape, sizes, strict=False)
        ):
            raise UsageError(f"shape {','.join(map(str, sizes))} does not fit input {spec}.")
        for axis, (dim, size) in enumerate(zip(spec.shape, sizes, strict=True)):
            if axis and isinstance(dim, str) and symbols.setdefault(dim, size) != size:
                raise UsageError(f"the shapes give axis {dim!r} both {symbols[dim]} and {size}.")
    return {
        spec.name: tuple(
            dim if isinstance(dim, int) else _size(spec, axis, dim, batch, shapes.get(spec.name), symbols)
            for axis, dim in enumerate(spec.shape)
        )
        for spec in specs
    }


def _size(
    spec: InputSpec, axis: int, dim: Dim, batch: int, given: Sequence[int] | None, symbols: Mapping[str, int]
) -> int:
    if axis == 0:
        return batch
    if given is not None:
        return given[axis]
    label = str(dim or "")
    if label in symbols:
        return symbols[label]
    if "seq" in label.lower() or "len" in label.lower():
        return SEQUENCE
    if axis in _spatial_axes(spec):
        return SPATIAL
    raise UsageError(
        f"the size of axis {axis} of input {spec} is not known; give it with --shape {_example(spec, batch)}"
    )


def _spatial_axes(spec: InputSpec) -> tuple[int, ...]:
    """Height and width of an image, channels first unless only the last axis can be the channels."""
    if spec.rank != 4:
        return ()
    return (1, 2) if spec.shape[3] in (1, 3, 4) and not isinstance(spec.shape[1], int) else (2, 3)


def _example(spec: InputSpec, batch: int) -> str:
    free = {2: (SEQUENCE,), 3: (SEQUENCE, 64), 4: (3, SPATIAL, SPATIAL)}.get(spec.rank, (16,) * (spec.rank - 1))
    sizes = [dim if isinstance(dim, int) else size for dim, size in zip(spec.shape, (batch, *free), strict=True)]
    return f"{spec.name}:{','.join(map(str, sizes))}"


def _random(spec: InputSpec, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    name = spec.name.lower()
    try:
        dtype = np.dtype(spec.dtype)
    except TypeError:
        dtype = np.dtype(object)
    if dtype.kind not in "fiub":
        raise UsageError(f"input {spec} cannot be made up; give data for it.")
    if dtype.kind == "b" or "mask" in name:
        return np.ones(shape, dtype)
    if dtype.kind == "f":
        return rng.standard_normal(shape).astype(dtype)
    if "type" in name or "segment" in name:
        return np.zeros(shape, dtype)
    return rng.integers(0, IDS, shape).astype(dtype)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(repr(name) for name in names)) or "none"
