"""What users ask for: a size, average bits, a latency, a drop. Text in, numbers out, one clear refusal each."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from onnxq.errors import UsageError

_AMOUNT = re.compile(r"\s*([0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z]*)\s*")
_SIZES = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


@dataclass(frozen=True)
class Limit:
    """A limit that stands for itself, or for a share of the float model's figure."""

    value: float
    relative: bool

    def of(self, reference: float) -> float:
        """The limit in the unit of `reference`, the float model's figure."""
        return self.value * reference if self.relative else self.value


@dataclass(frozen=True)
class Wishes:
    """What the allocation of bits has to meet; None where nothing was asked.

    Attributes:
        max_size: Bytes of the file, or a share of the float file's.
        avg_bits: Bits per weight on average.
        max_latency: Milliseconds per run, or a share of the float model's.
        max_drop: Share of the metric that may be lost.
        max_bops: Bit operations, or a share of the 8-bit network's.
        max_cost: A vendor's table (`onnxq.plan.costs.read_costs`), and the most that its costs may add up to.
    """

    max_size: Limit | None = None
    avg_bits: float | None = None
    max_latency: Limit | None = None
    max_drop: float | None = None
    max_bops: Limit | None = None
    max_cost: tuple[Path, float] | None = None

    def __bool__(self) -> bool:
        """Whether anything was asked."""
        return self != Wishes()


def read_wishes(
    *,
    max_size: str | None = None,
    avg_bits: float | str | None = None,
    max_latency: str | None = None,
    max_drop: float | str | None = None,
    max_bops: str | None = None,
    max_cost: str | None = None,
) -> Wishes:
    """Wishes as users write them.

    Args:
        max_size: "0.15x", "2MB", "800 KiB" or bytes.
        avg_bits: 2 to 8.
        max_latency: "0.6x" or "1.5ms".
        max_drop: A fraction of the metric: 0.005 is half a point.
        max_bops: "0.3x" of the 8-bit network's bit operations.
        max_cost: "table.csv=1200".

    Raises:
        UsageError: Names the option, and what it takes.
    """
    return Wishes(
        None if max_size is None else read_size(max_size),
        None if avg_bits is None else _within("--avg-bits", avg_bits, 2.0, 8.0, "2 to 8 bits, such as 4"),
        None if max_latency is None else read_latency(max_latency),
        None if max_drop is None else read_drop(max_drop),
        None if max_bops is None else read_bops(max_bops),
        None if max_cost is None else read_cost(max_cost),
    )


def read_size(text: str) -> Limit:
    """A size: "0.15x" of the float file, or bytes such as "2MB"."""
    takes = "a share of the float file's size such as 0.15x, or a size such as 2MB or 800KB"
    value, unit = _amount("--max-size", text, takes)
    if unit == "x":
        return Limit(_share("--max-size", text, value, takes), relative=True)
    if unit not in _SIZES or value * _SIZES[unit] < 1:
        raise UsageError(f"--max-size takes {takes}, not {text!r}.")
    return Limit(value * _SIZES[unit], relative=False)


def read_latency(text: str) -> Limit:
    """A latency: "0.6x" of the float model's, or milliseconds such as "1.5ms"."""
    takes = "a share of the float model's latency such as 0.6x, or milliseconds such as 1.5ms"
    value, unit = _amount("--max-latency", text, takes)
    if unit == "x":
        return Limit(_share("--max-latency", text, value, takes), relative=True)
    if unit != "ms" or value <= 0:
        raise UsageError(f"--max-latency takes {takes}, not {text!r}.")
    return Limit(value, relative=False)


def read_drop(text: float | str) -> float:
    """A drop of the metric as a fraction; 0 and more, below 1."""
    takes = "a fraction of the metric, 0 or more and below 1: 0.005 is half a point"
    return _within("--max-drop", text, 0.0, math.nextafter(1.0, 0.0), takes)


def read_bops(text: str) -> Limit:
    """Bit operations: "0.3x" of the 8-bit network's."""
    takes = "a share of the 8-bit network's bit operations such as 0.3x"
    value, unit = _amount("--max-bops", text, takes)
    if unit != "x":
        raise UsageError(f"--max-bops takes {takes}, not {text!r}.")
    return Limit(_share("--max-bops", text, value, takes), relative=True)


def read_cost(text: str) -> tuple[Path, float]:
    """A table and a limit: "table.csv=1200"."""
    name, found, limit = text.rpartition("=")
    try:
        value = float(limit)
    except ValueError:
        value = math.nan
    if not (found and name and math.isfinite(value)):
        raise UsageError(f"--max-cost takes a table of costs and a limit such as table.csv=1200, not {text!r}.")
    return Path(name), value


def _amount(option: str, text: str, takes: str) -> tuple[float, str]:
    match = _AMOUNT.fullmatch(text)
    if match is None:
        raise UsageError(f"{option} takes {takes}, not {text!r}.")
    return float(match[1]), match[2].lower()


def _share(option: str, text: str, value: float, takes: str) -> float:
    if not 0 < value <= 1:
        raise UsageError(f"{option} takes {takes}; the share {text!r} is not between 0 and 1.")
    return value


def _within(option: str, text: float | str, low: float, high: float, takes: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not low <= found <= high:
        raise UsageError(f"{option} takes {takes}, not {text!r}.")
    return found


def read_bits(text: str) -> tuple[tuple[int, int], ...]:
    """Bits to try: "4,3,2" for weights of 4, 3 and 2 bits, "4/6" for weights of 4 and activations of 6.

    Raises:
        UsageError: Something else is written, or a number is not from 2 to 8.
    """
    found = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([2-8])\s*(?:/\s*([2-8])\s*)?", part)
        if match is None:
            takes = "bits from 2 to 8 such as 4,3,2, or weights/activations such as 4/6"
            raise UsageError(f"--bits takes {takes}, not {text!r}.")
        found.append((int(match[1]), int(match[2] or 8)))
    return tuple(dict.fromkeys(found))
