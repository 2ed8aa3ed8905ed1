"""Mixed precision: errors of layers at every number of bits, and the sizes that can be had for them."""

from __future__ import annotations

import math

from onnxq.report import words
from onnxq.report.html import charts
from onnxq.report.html.charts import Point
from onnxq.report.html.markup import Html, section, table, tag
from onnxq.types.details import Details

SHADES = 5
"""Colours of the heat map."""


def front_section(details: Details) -> Html:
    """Size against error of the allocations that no other one beats."""
    if not details.front:
        return Html()
    on_front = sorted(details.front)
    others = [] if details.chosen is None or details.chosen in on_front else [details.chosen]
    least = min((error for _, error in on_front if error > 0), default=1e-12)
    points = [
        Point(size, max(error, least), f"{words.size(size)}: {error:.3g}", chosen=(size, error) == details.chosen)
        for size, error in (*on_front, *others)
    ]
    axes = ("size", "predicted error")
    picture = charts.scatter(points, "Predicted error over size", axes, joined=len(on_front), log=True)
    ordered = sorted([*on_front, *others])
    rows = [
        (words.size(size), f"{error:.3g}", "yes" if (size, error) == details.chosen else "") for size, error in ordered
    ]
    listed = tag(
        "details",
        tag("summary", "The same as a table"),
        table(("Size", "Predicted error", "Chosen"), rows, "Allocations, the smallest first"),
    )
    ring = " The ring is the one that was taken." if any(point.chosen for point in points) else ""
    said = (
        f"Each point gives some layers fewer bits; of those joined, no other is both smaller and nearer.{ring} "
        "Errors are predicted: the sum of what single layers add."
    )
    return section("front", "Size against error", tag("p", said), picture, listed)


def sensitivity_section(details: Details) -> Html:
    """A heat map: the error each layer adds at each number of bits."""
    if not details.sensitivity:
        return Html()
    columns = list(dict.fromkeys(bits for at in details.sensitivity.values() for bits in at))
    errors = [error for at in details.sensitivity.values() for error in at.values() if error > 0]
    low, high = (math.log10(end) for end in (min(errors, default=1.0), max(errors, default=1.0)))

    def cell(error: float | None) -> Html | str:
        if error is None:
            return "\N{EN DASH}"
        place = 0.0 if error <= 0 or high <= low else (math.log10(error) - low) / (high - low)
        return tag(f"span.heat.h{min(int(place * SHADES), SHADES - 1)}", words.short(error))

    rows = ((name, *(cell(at.get(bits)) for bits in columns)) for name, at in details.sensitivity.items())
    said = (
        "The error that each layer adds with everything else at 8 bits; the stronger the colour, the larger, on a "
        "logarithmic scale. Errors of 0 and below are noise."
    )
    return section(
        "sensitivity", "Sensitivity", tag("p", said), table(("Layer", *columns), rows, "Added error by layer and bits")
    )
