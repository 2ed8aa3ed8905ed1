"""Pictures as inline SVG. Each says in words what it shows; colours come from the page's style."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from onnxq.report import words
from onnxq.report.html.markup import Html, tag
from onnxq.types import Interval
from onnxq.types.details import Bars

BEST_DB = 60.0
"""SQNR that fills a bar."""
LEVELS = (10.0, 20.0, 30.0, 40.0)
"""SQNR at which the colour changes."""


def level(sqnr_db: float | None) -> str:
    """The class of a colour: "d0" for the largest error to "d4" for the smallest; "dx" where nothing was measured."""
    if sqnr_db is None or math.isnan(sqnr_db):
        return "dx"
    return f"d{sum(sqnr_db >= end for end in LEVELS)}"


def bar(sqnr_db: float | None) -> Html:
    """An SQNR as a bar with its figure."""
    filled = 0.0 if sqnr_db is None else max(0.0, min(sqnr_db / BEST_DB, 1.0))
    picture = tag(
        "svg.bar",
        tag("rect.track", width=100, height=8, rx=2),
        tag(f"rect.{level(sqnr_db)}", width=_r(100 * filled), height=8, rx=2),
        viewBox="0 0 100 8",
        preserveAspectRatio="none",
        aria_hidden="true",
    )
    return tag("span.measure", picture, tag("span.figure", words.decibels(sqnr_db)))


def share(part: float, kind: str = "part") -> Html:
    """A share of 1 as a bar without a figure; `kind` is the class of its colour."""
    filled = 100 * max(0.0, min(part, 1.0))
    return tag(
        "svg.bar",
        tag("rect.track", width=100, height=8, rx=2),
        tag(f"rect.{kind}", width=_r(filled), height=8, rx=2),
        viewBox="0 0 100 8",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def histogram(bars: Bars, title: str, caption: str, clip: tuple[float, float] | None = None) -> Html:
    """Counts on a logarithmic scale; what lies beyond `clip` is shaded."""
    width, height, base = 320.0, 104.0, 86.0
    most = math.log1p(max(bars.counts, default=0.0)) or 1.0
    step = width / len(bars.counts)
    path = [f"M0 {base:g}"]
    for index, count in enumerate(bars.counts):
        top = base - (base - 8) * math.log1p(max(count, 0.0)) / most
        path.append(f"V{_r(top)}H{_r(step * (index + 1))}")
    path.append(f"V{base:g}Z")

    def place(value: float) -> float:
        spread = bars.high - bars.low
        return width * min(max((value - bars.low) / spread, 0.0), 1.0) if spread > 0 else width / 2

    marks: list[Html] = []
    if clip is not None:
        left, right = place(clip[0]), place(clip[1])
        marks = [
            tag("rect.beyond", x=0, y=0, width=_r(left), height=base),
            tag("rect.beyond", x=_r(right), y=0, width=_r(width - right), height=base),
            *(tag("line.clip", x1=_r(x), x2=_r(x), y1=0, y2=base) for x in (left, right)),
        ]
    ends = [
        tag("text", words.number(bars.low), x=0, y=_r(height - 4)),
        tag("text", words.number(bars.high), x=width, y=_r(height - 4), text_anchor="end"),
    ]
    if bars.low < 0 < bars.high and 50 < place(0.0) < width - 50:
        ends.append(tag("text", "0", x=_r(place(0.0)), y=_r(height - 4), text_anchor="middle"))
    picture = tag(
        "svg.histogram",
        marks[:2],
        tag("path.counts", d="".join(path)),
        marks[2:],
        tag("line.axis", x1=0, x2=width, y1=base, y2=base),
        ends,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=f"{title}: {caption}",
    )
    return tag("figure", tag("h4", title), picture, tag("figcaption", caption))


def whisker(interval: Interval, low: float, high: float, title: str, mark: float | None = None) -> Html:
    """A figure with its interval on the line from `low` to `high`; `mark` is what it is compared with."""
    spread = max(high - low, 1e-12)

    def place(value: float) -> float:
        return 4 + 192 * min(max((value - low) / spread, 0.0), 1.0)

    left, middle, right = (_r(place(value)) for value in (interval.low, interval.value, interval.high))
    reference = [] if mark is None else [tag("line.mark", x1=_r(place(mark)), x2=_r(place(mark)), y1=1, y2=19)]
    return tag(
        "svg.whisker",
        tag("line.axis", x1=4, x2=196, y1=10, y2=10),
        reference,
        tag("line.interval", x1=left, x2=right, y1=10, y2=10),
        (tag("line.interval", x1=end, x2=end, y1=6, y2=14) for end in (left, right)),
        tag("circle.dot", cx=middle, cy=10, r=4),
        viewBox="0 0 200 20",
        preserveAspectRatio="xMinYMid meet",
        role="img",
        aria_label=title,
    )


@dataclass(frozen=True)
class Point:
    """One point of a chart.

    Attributes:
        x: To the right.
        y: Upwards; above 0 on a logarithmic axis.
        label: Shown when the pointer rests on it.
        name: Written beside it.
        chosen: Drawn with a ring.
    """

    x: float
    y: float
    label: str
    name: str = ""
    chosen: bool = False


def scatter(
    points: Sequence[Point],
    title: str,
    axes: tuple[str, str],
    *,
    joined: int = 0,
    log: bool = False,
) -> Html:
    """Points over two axes; the x axis shows bytes.

    Args:
        points: At least one.
        title: What the picture shows.
        axes: Names of the horizontal and the vertical axis.
        joined: How many of the points, from the first one, a line joins.
        log: Logarithmic vertical axis.
    """
    width, height, left, base = 640.0, 300.0, 74.0, 252.0
    heights = [math.log10(point.y) if log else point.y for point in points]
    x_ends, y_ends = _ends([point.x for point in points]), _ends(heights)
    across = [left + (width - left - 24) * (point.x - x_ends[0]) / (x_ends[1] - x_ends[0]) for point in points]
    up = [base - (base - 20) * (value - y_ends[0]) / (y_ends[1] - y_ends[0]) for value in heights]
    corners = " ".join(f"{_r(x)},{_r(y)}" for x, y in zip(across[:joined], up[:joined], strict=True))
    dots = [
        tag(
            f"circle.{'chosen' if point.chosen else 'dot'}",
            tag("title", point.label),
            cx=_r(x),
            cy=_r(y),
            r=8 if point.chosen else 5,
        )
        for point, x, y in zip(points, across, up, strict=True)
    ]
    dots += [tag("text", point.name, x=_r(x + 9), y=_r(y + 4)) for point, x, y in zip(points, across, up, strict=True)]
    low, high = (10**end if log else end for end in y_ends)
    texts = [
        tag("text", words.size(max(x_ends[0], 0.0)), x=left, y=base + 18),
        tag("text", words.size(x_ends[1]), x=width - 24, y=base + 18, text_anchor="end"),
        tag("text", axes[0], x=(left + width - 24) / 2, y=base + 38, text_anchor="middle"),
        tag("text", words.number(high), x=left - 8, y=24, text_anchor="end"),
        tag("text", words.number(low), x=left - 8, y=base, text_anchor="end"),
        tag("text", axes[1], x=left + 8, y=14),
    ]
    return tag(
        "svg.scatter",
        tag("line.axis", x1=left, x2=width - 24, y1=base, y2=base),
        tag("line.axis", x1=left, x2=left, y1=20, y2=base),
        tag("polyline.front", points=corners) if joined else None,
        dots,
        texts,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=title,
    )


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """An axis with some room at both sides."""
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _r(value: float) -> str:
    """A coordinate, to a tenth."""
    return f"{value:.1f}".removesuffix(".0")
