"""Figures as people read them."""

from __future__ import annotations

import math

from onnxq.types import Interval


def size(count: float) -> str:
    """Bytes in the unit that fits."""
    for unit in ("B", "KB", "MB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def percent(share: float, digits: int = 1) -> str:
    """A share of 1."""
    return f"{100 * share:.{digits}f} %"


def between(interval: Interval) -> str:
    """The 95 % interval of a share."""
    return f"95 % CI {100 * interval.low:.1f} to {100 * interval.high:.1f} %"


def ranged(interval: Interval) -> str:
    """A share with its 95 % interval."""
    return f"{percent(interval.value)} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"


def decibels(value: float | None) -> str:
    """An SQNR; "exact" where there is no noise at all."""
    if value is None:
        return "not measured"
    if math.isinf(value):
        return "exact" if value > 0 else "lost"
    return f"{value:.1f} dB"


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}".replace("-", "\N{MINUS SIGN}", 1) if value < 0 else f"{value:.4g}"


def short(value: float) -> str:
    """Two significant digits."""
    return f"{value:.2g}".replace("-", "\N{MINUS SIGN}", 1) if value < 0 else f"{value:.2g}"


def millions(count: int) -> str:
    """Multiply-accumulates."""
    return f"{count / 1e6:.2f} M" if count >= 5000 else str(count)


def shape(sizes: tuple[int, ...]) -> str:
    """Sizes of a weight."""
    return " \N{MULTIPLICATION SIGN} ".join(map(str, sizes))


def times(count: int, one: str, many: str) -> str:
    """A count with its noun."""
    return f"{count} {one if count == 1 else many}"
