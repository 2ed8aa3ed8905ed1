"""The page that shows two or more runs side by side, from their JSON documents."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from onnxq.report import comparing, words
from onnxq.report.comparing import NONE, Document
from onnxq.report.html import charts
from onnxq.report.html.charts import Point
from onnxq.report.html.markup import Content, Html, join, page, section, table, tag
from onnxq.types import Interval
from onnxq.version import __version__


def html_compare(reports: Sequence[Document]) -> str:
    """Runs side by side as a self-contained HTML document.

    Args:
        reports: Two or more documents as `quantize --json` prints them; the first one is what the others are compared
            with.

    Raises:
        UsageError: There are fewer than two, or one is no such document of this version.
    """
    comparing.require_runs(reports)
    names = comparing.names(reports)
    parts = [
        ("figures", "Figures", _figures_section(names, reports)),
        ("picture", "Size against error", _picture_section(names, reports)),
        ("recipes", "Recipes", _recipes_section(names, reports)),
        ("bits", "Bits", _bits_section(names, reports)),
        ("warnings", "Warnings", _warnings_section(names, reports)),
    ]
    head = tag(
        "div",
        tag("p.kind", "onnxq quantize"),
        tag("h1", f"{len(reports)} runs compared"),
        tag("p.verdict", _sources(reports)),
    )
    return page(f"{len(reports)} runs - onnxq", head, parts, f"Made by onnxq {__version__}.")


def _sources(reports: Sequence[Document]) -> str:
    sources = comparing.models(reports)
    if len(sources) > 1:
        return f"Of different models ({', '.join(sources)}), so no run is called better than another."
    return f"Of {sources[0]}. The first run is what the others are compared with."


def _figures_section(names: Sequence[str], reports: Sequence[Document]) -> Html:
    verdicts = [report.get("verdict") for report in reports]
    alike = len(comparing.models(reports)) == 1
    rows: list[tuple[Content, ...]] = [
        ("Size", *_each(verdicts, _size)),
        ("SQNR", *_each(verdicts, _sqnr)),
        ("Top-1", *_intervals(reports, comparing.accuracy, comparing.against_accuracy if alike else None)),
        ("Agreement", *_intervals(reports, comparing.agreement, comparing.against_agreement if alike else None)),
        ("Integer coverage", *_each(verdicts, lambda verdict: words.percent(verdict["integer_coverage"]))),
        ("Latency, of float", *_intervals(reports, comparing.latency, comparing.against_latency if alike else None)),
        ("Time of the run", *(f"{report.get('seconds') or 0.0:.1f} s" for report in reports)),
    ]
    shown = [row for row in rows if any(cell != NONE for cell in row[1:])]
    said = (
        "Each interval is of 95 %. Runs that judged the same rows are compared row by row with McNemar's exact test; "
        "for latencies, and where the rows differ, a run is called better or worse than the first only where the two "
        "intervals do not overlap. What is inside the noise is neither a gain nor a loss. SQNR has no interval, so it "
        "is only shown."
    )
    return section("figures", "Figures", tag("p", said), table(("", *names), shown, "Figures of all runs"))


def _each(verdicts: Sequence[Document | None], show: Callable[[Document], Content]) -> Iterator[Content]:
    for verdict in verdicts:
        yield NONE if verdict is None else show(verdict)


def _size(verdict: Document) -> Html:
    small, big = verdict["quantized_bytes"], verdict["float_bytes"]
    return join((words.size(small), tag("span.sub", f"{words.percent(small / max(big, 1))} of float")))


def _sqnr(verdict: Document) -> Html:
    """Of each output; JSON has no infinity, so None stands for it."""
    found = verdict["sqnr_db"].items()
    return join([charts.bar(float("inf") if sqnr is None else sqnr) for _, sqnr in found])


def _intervals(
    reports: Sequence[Document],
    read: Callable[[Document], Interval | None],
    against: Callable[[Document, Document], str | None] | None,
) -> Iterator[Content]:
    """Cells of one figure.

    Args:
        reports: All runs.
        read: Takes the figure from one.
        against: What may be said of a run against the first; None where nothing may.
    """
    found = [read(report) for report in reports]
    known = [interval for interval in found if interval is not None]
    low, high = min((i.low for i in known), default=0.0), max((i.high for i in known), default=1.0)
    for index, interval in enumerate(found):
        if interval is None:
            yield NONE
            continue
        said = against(reports[0], reports[index]) if against is not None and index else None
        figure = words.ranged(interval)
        yield join((figure, charts.whisker(interval, low, high, figure), tag("span.sub", said) if said else None))


def _picture_section(names: Sequence[str], reports: Sequence[Document]) -> Html:
    points = []
    for name, report in zip(names, reports, strict=True):
        verdict = report.get("verdict")
        values = [value for value in verdict["sqnr_db"].values() if value is not None] if verdict is not None else []
        if verdict is not None and values:
            label = f"{name}: {words.size(verdict['quantized_bytes'])}, {words.decibels(min(values))}"
            points.append(Point(verdict["quantized_bytes"], min(values), label, name.partition(":")[0]))
    if len(points) < 2:
        return Html()
    picture = charts.scatter(points, "SQNR over size of each run", ("size", "SQNR of the worst output, dB"))
    listed = tag("ul", (tag("li", point.label) for point in points))
    return section("picture", "Size against error", picture, listed)


def _recipes_section(names: Sequence[str], reports: Sequence[Document]) -> Html:
    recipes = [report.get("recipe", {}) for report in reports]
    rows = [(field, *(_setting(recipe.get(field)) for recipe in recipes)) for field in _keys(recipes)]
    rows = _differing(rows)
    if not rows:
        return section("recipes", "Recipes", tag("p", "All runs had the same recipe."))
    return section("recipes", "Recipes", table(("Field", *names), rows, "Fields that differ"))


def _setting(value: object) -> str:
    """A field of a recipe; older documents may not have it, which is as if nothing was asked for."""
    if value is None or value in ("", []):
        return NONE
    if isinstance(value, list):
        return ", ".join(part if isinstance(part, str) else json.dumps(part) for part in value)
    return str(value)


def _bits_section(names: Sequence[str], reports: Sequence[Document]) -> Html:
    rows = [
        (layer, *(_layer_bits(layer, report) for report in reports))
        for layer in _keys([report.get("layers", {}) for report in reports])
    ]
    rows = _differing(rows)
    if not rows:
        return section("bits", "Bits", tag("p", "All layers have the same weight bits in all runs."))
    return section("bits", "Bits", table(("Layer", *names), rows, "Layers with different weight bits"))


def _layer_bits(layer: str, report: Document) -> str:
    found = report.get("layers", {}).get(layer)
    if found is not None:
        return f"W{found['weight_bits']}"
    return "float" if layer in report.get("skipped", {}) else NONE


def _keys(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for entries in tables for key in entries))


def _differing(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    return [row for row in rows if len(set(row[1:])) > 1]


def _warnings_section(names: Sequence[str], reports: Sequence[Document]) -> Html:
    found = [
        (name, (report.get("verdict") or {}).get("warnings", ())) for name, report in zip(names, reports, strict=True)
    ]
    rows = [(name, tag("ul", (tag("li", text) for text in texts))) for name, texts in found if texts]
    return section("warnings", "Warnings", table(("Run", "Warnings"), rows, "Warnings of each run")) if rows else Html()
