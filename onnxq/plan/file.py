"""The plan file: a QuantPlan as JSON, to read, diff, edit by hand and emit again.

Numbers are written with enough digits to come back exactly. Unknown keys are errors.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.errors import EnvironmentFault, InputError
from onnxq.grid import Grid
from onnxq.hints import did_you_mean
from onnxq.plan.codebook import BITS
from onnxq.types import BlockGrid, Border, LearnedLayer, LogGrid, QuantPlan, TensorGrid, WeightGrid

SCHEMA = 1
EXTRA = ("origin", "ranges")
"""Keys of a file that are not the plan's: they say where it came from (`origin`)."""


def plan_to_json(plan: QuantPlan, extra: Mapping[str, Any] | None = None) -> str:
    """The plan as a JSON document, one line per tensor, weight and node; `extra` is what `EXTRA` names."""
    document = {"schema": SCHEMA, **asdict(plan), **(extra or {})}
    return _pretty(document) + "\n"


def plan_from_json(text: str, where: str = "plan") -> QuantPlan:
    """The plan of a JSON document.

    Raises:
        InputError: It is not a plan; the message names the key.
    """
    try:
        document = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is not JSON: {error}") from error
    if not isinstance(document, dict) or document.pop("schema", None) != SCHEMA:
        raise InputError(f"{where} is not a plan of schema {SCHEMA}.")
    for key in EXTRA:
        document.pop(key, None)
    _known(document, QuantPlan, where)
    try:
        return QuantPlan(
            target=document["target"],
            source=document["source"],
            tensors={key: _grid(value, f"{where}: tensor {key}") for key, value in document["tensors"].items()},
            weights={key: _weight(value, f"{where}: weight {key}") for key, value in document["weights"].items()},
            integer=_names(document["integer"], "integer", where),
            skipped=dict(document["skipped"]),
            guards=_names(document.get("guards", []), "guards", where),
            sums=_names(document.get("sums", []), "sums", where),
            constants={
                key: _grid(value, f"{where}: constant {key}") for key, value in document.get("constants", {}).items()
            },
            tables=_names(document.get("tables", []), "tables", where),
            borders={
                key: _border(value, f"{where}: border {key}") for key, value in document.get("borders", {}).items()
            },
            log_softmax={
                key: _log_grid(value, f"{where}: softmax {key}")
                for key, value in document.get("log_softmax", {}).items()
            },
            blocks={key: _block(value, f"{where}: block {key}") for key, value in document.get("blocks", {}).items()},
            half=_names(document.get("half", []), "half", where),
            dynamic=_names(document.get("dynamic", []), "dynamic", where),
        )
    except KeyError as error:
        raise InputError(f"{where} lacks the key {error}.") from error
    except (TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{where} holds a value of the wrong kind: {error}") from error


def save_plan(plan: QuantPlan, path: Path) -> None:
    """Write the plan file, whole or not at all; `EnvironmentFault` when that cannot be done."""
    try:
        with graph.atomic_path(path) as temporary:
            temporary.write_text(plan_to_json(plan), encoding="utf-8")
    except OSError as error:
        raise EnvironmentFault(f"{path} cannot be written: {error.strerror or error}.") from error


def save_learned(layers: Mapping[str, LearnedLayer], path: Path) -> None:
    """Write learned codes and biases beside a plan, as .npz; whole or not at all. `EnvironmentFault` as above.

    The array `names` lists the nodes; `codes_0`, `bias_0` and so on belong to them in this order.
    """
    arrays: dict[str, npt.NDArray[Any]] = {"names": np.array(list(layers), np.str_)}
    for index, layer in enumerate(layers.values()):
        arrays[f"codes_{index}"] = layer.codes
        if layer.bias is not None:
            arrays[f"bias_{index}"] = layer.bias
    try:
        with graph.atomic_path(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
    except OSError as error:
        raise EnvironmentFault(f"{path} cannot be written: {error.strerror or error}.") from error


def load_learned(path: Path) -> dict[str, LearnedLayer]:
    """Read what `save_learned` wrote; `InputError` when it is something else."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
            stored = dict(arrays)
        names = [str(name) for name in stored["names"]]
        return {
            name: LearnedLayer(stored[f"codes_{index}"], stored.get(f"bias_{index}"))
            for index, name in enumerate(names)
        }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"{path} holds no learned layers: {error}") from error


def load_plan(path: Path) -> QuantPlan:
    """Read a plan file; `InputError` when it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    return plan_from_json(text, path.name)


def _grid(value: Mapping[str, Any], where: str) -> TensorGrid:
    _known(value, TensorGrid, where)
    grid = TensorGrid(**value)
    if not (np.isfinite(grid.scale) and grid.scale > 0):
        raise InputError(f"{where}: the scale must be a positive number, not {grid.scale}.")
    for key in ("signed", "everywhere"):
        if not isinstance(getattr(grid, key), bool):
            raise InputError(f"{where}: {key} must be true or false, not {getattr(grid, key)!r}.")
    codes = Grid(_bits(grid.bits, where, wide=True), grid.signed, symmetric=False)
    if type(grid.zero_point) is not int or not codes.qmin <= grid.zero_point <= codes.qmax:
        raise InputError(f"{where}: the zero point must be one of {codes.qmin} to {codes.qmax}, not {grid.zero_point}.")
    return grid


def _weight(value: Mapping[str, Any], where: str) -> WeightGrid:
    _known(value, WeightGrid, where)
    scales = tuple(float(step) for step in value["scales"])
    books = tuple(tuple(book) for book in value.get("values", ()))
    grid = WeightGrid(scales, value["axis"], value["bits"], tuple(value.get("lowest", ())), books)
    if not grid.scales or min(grid.scales) <= 0 or not np.isfinite(grid.scales).all():
        raise InputError(f"{where}: scales must be positive numbers.")
    if grid.axis is not None and type(grid.axis) is not int:
        raise InputError(f"{where}: the axis must be an integer or null, not {grid.axis!r}.")
    if grid.values:
        _require_books(grid, where)
        return grid
    last = (1 << _bits(grid.bits, where)) - 1
    if grid.lowest and (grid.bits == 8 or len(grid.lowest) != len(grid.scales)):
        raise InputError(f"{where}: lowest codes must be as many as scales, and are for up to 7 bits.")
    if not all(type(code) is int and -last <= code <= 0 for code in grid.lowest):
        raise InputError(f"{where}: lowest codes must be integers from {-last} to 0.")
    return grid


def _require_books(grid: WeightGrid, where: str) -> None:
    if type(grid.bits) is not int or grid.bits not in BITS or grid.lowest:
        raise InputError(f"{where}: codebooks have 1 to 4 bits and no lowest codes.")
    if len(grid.values) not in (1, len(grid.scales)):
        raise InputError(f"{where}: codebooks must be as many as scales, or a single one.")
    for book in grid.values:
        whole = all(type(code) is int and -127 <= code <= 127 for code in book)
        if not whole or not 1 <= len(book) <= 2**grid.bits or sorted(set(book)) != list(book):
            raise InputError(f"{where}: a codebook is up to {2**grid.bits} ascending integers from -127 to 127.")


def _border(value: Mapping[str, Any], where: str) -> Border:
    _known(value, Border, where)
    terms = np.asarray(value["terms"], np.float64)
    if terms.ndim != 2 or terms.shape[1] != 3 or not np.isfinite(terms).all():
        raise InputError(f"{where}: terms must be three numbers for each channel.")
    if type(value["axis"]) is not int or value["axis"] >= 0:
        raise InputError(f"{where}: the axis must be an integer below 0, not {value['axis']!r}.")
    return Border(value["axis"], tuple((float(b0), float(b1), float(b2)) for b0, b1, b2 in terms))


def _log_grid(value: Mapping[str, Any], where: str) -> LogGrid:
    _known(value, LogGrid, where)
    if type(value["per_octave"]) is not int or value["per_octave"] not in (1, 2):
        raise InputError(f"{where}: per_octave must be 1 or 2, not {value['per_octave']!r}.")
    return LogGrid(_bits(value["bits"], where), value["per_octave"])


def _block(value: Mapping[str, Any], where: str) -> BlockGrid:
    _known(value, BlockGrid, where)
    if value["bits"] not in (4, 8) or type(value["block"]) is not int or value["block"] < 16:
        raise InputError(f"{where}: a block has 4 or 8 bits and 16 inputs or more.")
    return BlockGrid(value["bits"], value["block"])


def _bits(value: object, where: str, *, wide: bool = False) -> int:
    if type(value) is not int or not (2 <= value <= 8 or (wide and value == 16)):
        takes = "one of 2 to 8, or 16" if wide else "one of 2 to 8"
        raise InputError(f"{where}: bits must be {takes}, not {value!r}.")
    return value


def _names(names: object, key: str, where: str) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{where}: {key} must be a list of names.")
    return tuple(names)


def _known(value: Mapping[str, Any], kind: type, where: str) -> None:
    names = [entry.name for entry in fields(kind)]
    for key in value:
        if key not in names:
            raise InputError(f"{where}: unknown key {key!r}.{did_you_mean(key, names)}")


def _pretty(document: Mapping[str, Any]) -> str:
    lines = []
    for key, value in document.items():
        if isinstance(value, dict) and value:
            inner = ",\n".join(f"    {json.dumps(name)}: {json.dumps(entry)}" for name, entry in value.items())
            lines.append(f"  {json.dumps(key)}: {{\n{inner}\n  }}")
        elif isinstance(value, list | tuple) and value:
            inner = ",\n".join(f"    {json.dumps(entry)}" for entry in value)
            lines.append(f"  {json.dumps(key)}: [\n{inner}\n  ]")
        else:
            lines.append(f"  {json.dumps(key)}: {json.dumps(value)}")
    return "{\n" + ",\n".join(lines) + "\n}"
