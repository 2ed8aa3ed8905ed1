"""Channels and calibration samples that stretch the ranges of all others."""

from __future__ import annotations

from collections.abc import Sequence

from onnxq.report import words
from onnxq.report.html.markup import Html, section, table, tag
from onnxq.types.details import Details
from onnxq.types.outliers import Outlier

SHOWN = 6
"""Most channels or samples of a tensor that are named."""


def outliers_section(details: Details) -> Html:
    """What stands out in the tensors that layers read; says so where nothing does, and is left out unmeasured."""
    if not details.outlier_rows:
        return Html()
    looked = f"in {words.times(details.outlier_rows, 'calibration row', 'calibration rows')}"
    if not details.outliers:
        return section("outliers", "Outliers", tag("p", f"No channel and no sample stands out {looked}."))
    said = (
        "A channel or a sample stands out where its largest magnitude is several times the median of all, far beyond "
        f"their spread; it stretches the range that the others share. Looked for {looked}; samples are counted from 0 "
        "in the order of the data. Loud samples can be taken out of the data, or cut by a percentile range; loud "
        "channels are moved by --migrate-norms where a normalisation is in front of them."
    )
    readers: dict[str, list[str]] = {}
    for layer in details.layers:
        readers.setdefault(layer.source, []).append(layer.name)
    rows = (
        (
            tag("span.name", name),
            ", ".join(readers.get(name, ())) or "\N{EN DASH}",
            _named(found.channels, found.count),
            _named(found.samples, None),
        )
        for name, found in details.outliers.items()
    )
    shown = table(("Tensor", "Read by", "Channels", "Samples"), rows, "Outliers by tensor")
    return section("outliers", "Outliers", tag("p", said), shown)


def _named(found: Sequence[Outlier], count: int | None) -> Html | str:
    """The most extreme ones with their magnitude over the median, and how many there are."""
    if not found:
        return "\N{EN DASH}"
    items = [
        tag("li", f"{one.index}: {one.times:.3g}x the median, up to {words.number(one.magnitude)}") for one in found
    ]
    rest = f"and {len(items) - SHOWN} more" if len(items) > SHOWN else None
    whole = f"{len(items)} of {count}" if count is not None else None
    return tag("div", tag("span.sub", whole) if whole else None, tag("ul", items[:SHOWN]), rest)
