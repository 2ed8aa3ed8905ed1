"""What layers cost at each number of bits: bytes of the file, average bits, bit operations, a vendor's table."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from onnxq.errors import InputError
from onnxq.plan.placement import Placement
from onnxq.types.mixed import BASE, FLOAT, Bits, Costs

COLUMNS = ("layer", "weight_bits", "activation_bits", "cost")


Stored = Callable[[int, int, int], int]
"""Bytes of so many weights of so many bits (2 to 8) with so many steps."""


def size_costs(
    placement: Placement, options: Collection[Bits], base_bytes: int, stored: Stored, *, per_channel: bool = True
) -> Costs:
    """Bytes of the quantized file.

    Scales, zero points and biases, activation grids, names and nodes are the constant: what the base's file holds
    besides codes of weights. A float layer has no scales of weight and bias, and no zero points.

    Args:
        placement: Where nodes run.
        options: Bits that layers may get.
        base_bytes: Bytes of the file with all layers at 8 bits.
        stored: How weights are stored.
        per_channel: One weight step per output channel.
    """
    layers: dict[str, dict[Bits, float]] = {}
    codes = 0
    for unit in placement.layers:
        assert unit.layer is not None
        count, steps = unit.layer.weight.size, unit.layer.channels if per_channel else 1
        codes += stored(count, BASE[0], steps)
        layers[unit.name] = {
            bits: 4 * count - 9 * steps if bits == FLOAT else stored(count, bits[0], steps) for bits in options
        }
    return Costs("size", "bytes", layers, base_bytes - codes)


def average_bits(placement: Placement, options: Collection[Bits]) -> Costs:
    """Bits per weight, on average over the weights of all integer layers; arguments as for `size_costs`."""
    counts = {unit.name: unit.layer.weight.size for unit in placement.layers if unit.layer is not None}
    total = sum(counts.values())
    layers = {name: {bits: count * bits[0] / total for bits in options} for name, count in counts.items()}
    return Costs("average weight bits", "bits", layers)


def bit_operations(macs: Mapping[str, int], placement: Placement, options: Collection[Bits]) -> Costs:
    """Multiply-accumulates times weight bits times activation bits; a float layer counts 32 times 32.

    Args:
        macs: Multiply-accumulates per row by node name.
        placement: Where nodes run.
        options: Bits that layers may get.
    """
    layers = {
        unit.name: {bits: float(macs.get(unit.name, 0) * bits[0] * bits[1]) for bits in options}
        for unit in placement.layers
    }
    return Costs("bit operations", "BOPs", layers)


def read_costs(path: Path, name: str = "cost") -> Costs:
    """A vendor's cost table: CSV with the columns layer, weight_bits, activation_bits, cost.

    A layer in float has 32 bits of both. An empty layer name holds the constant of the whole model.

    Args:
        path: The file.
        name: What the costs are called in messages.

    Raises:
        InputError: It cannot be read, lacks a column, or holds something that is no number or stands there twice.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise InputError(f"{path} lacks the column {missing[0]!r}; a cost table has {', '.join(COLUMNS)}.")
            rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"the cost table {path} cannot be read: {error}") from error
    layers: dict[str, dict[Bits, float]] = {}
    constant = 0.0
    for line, row in rows:
        cost = _number(row["cost"], path, line)
        if not row["layer"]:
            constant += cost
            continue
        bits = (_whole(row["weight_bits"], path, line), _whole(row["activation_bits"], path, line))
        known = layers.setdefault(row["layer"], {})
        if bits in known:
            raise InputError(f"{path}, line {line}: {row['layer']!r} at {bits[0]}/{bits[1]} bits stands there twice.")
        known[bits] = cost
    return Costs(name, "", layers, constant)


def _number(text: str | None, path: Path, line: int) -> float:
    try:
        found = float(text or "")
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise InputError(f"{path}, line {line}: {text!r} is not a number.")
    return found


def _whole(text: str | None, path: Path, line: int) -> int:
    found = _number(text, path, line)
    if found != int(found):
        raise InputError(f"{path}, line {line}: bits are whole numbers, not {text!r}.")
    return int(found)
