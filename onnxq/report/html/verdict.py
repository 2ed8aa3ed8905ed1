"""The top of the page: one sentence, the figures with their intervals, and what must be read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from onnxq.report import words
from onnxq.report.html import charts
from onnxq.report.html.markup import Content, Html, section, tag
from onnxq.types import Evaluation, Latency, Summary, Verdict


def headline(run: Summary) -> Html:
    """The model's name and the verdict in one sentence."""
    name = PurePath(run.source).name
    return tag("div", tag("p.kind", "onnxq quantize"), tag("h1", name), tag("p.verdict", _sentence(run)))


def _sentence(run: Summary) -> str:
    verdict = run.verdict
    if verdict is None:
        return "A dry run: the plan below was made, nothing was measured and nothing was written."
    parts = [_shrink(verdict)]
    if len(verdict.latency) > 1:
        parts.append(f"latency: {verdict.latency[1].words}")
    if run.evaluation is not None and run.evaluation.accuracy is not None:
        parts.append(f"top-1 {words.percent(run.evaluation.accuracy.value, 2)}, {_difference(run.evaluation)}")
    elif verdict.fidelity.agreement is not None:
        agreement = verdict.fidelity.agreement
        parts.append(
            f"the same class on {words.percent(agreement.value)} of {verdict.fidelity.rows} held-out rows "
            f"({words.between(agreement)})"
        )
    return "; ".join(parts) + "."


def _shrink(verdict: Verdict) -> str:
    sizes = f"{words.size(verdict.float_bytes)} to {words.size(verdict.quantized_bytes)}"
    if verdict.quantized_bytes >= verdict.float_bytes:
        return f"Not smaller: {sizes}"
    return f"{verdict.float_bytes / max(verdict.quantized_bytes, 1):.2f}x smaller, {sizes}"


def _difference(found: Evaluation) -> str:
    """What may be said about the two accuracies."""
    if found.paired is None:
        return "without a float result to compare with"
    return f"against the float model {found.paired.words}"


def verdict_section(run: Summary) -> Html:
    """Warnings, and a card per figure."""
    if run.verdict is None:
        return Html()
    warnings = run.verdict.warnings
    alert = (
        tag(
            "div.warnings",
            tag("h3", words.times(len(warnings), "warning", "warnings")),
            tag("ul", (tag("li", text) for text in warnings)),
            role="note",
        )
        if warnings
        else None
    )
    notes = [tag("p", note) for note in run.verdict.notes]
    return section("verdict", "Verdict", alert, tag("ul.cards", _cards(run, run.verdict)), *notes)


def _card(name: str, figure: str, *content: Content) -> Html:
    return tag("li.card", tag("h3", name), tag("p.big", figure), (tag("p", part) for part in content if part))


def _cards(run: Summary, verdict: Verdict) -> Iterator[Html]:
    left = verdict.quantized_bytes / max(verdict.float_bytes, 1)
    yield _card(
        "Size",
        words.size(verdict.quantized_bytes),
        charts.share(left),
        f"{words.percent(left)} of the float file's {words.size(verdict.float_bytes)}",
    )
    for latency in verdict.latency[1:]:
        yield _latency_card(verdict.latency[0], latency, verdict)
    if run.evaluation is not None and run.evaluation.accuracy is not None:
        yield _accuracy_card(run.evaluation)
    fidelity = verdict.fidelity
    if fidelity.agreement is not None:
        found = fidelity.agreement
        picture = charts.whisker(found, min(found.low, 0.9), 1.0, f"agreement with {words.between(found)}")
        yield _card(
            "Agreement",
            words.percent(found.value),
            picture,
            words.between(found),
            f"the same class as the float model on {fidelity.rows} held-out rows",
        )
    for name, sqnr in fidelity.sqnr_db.items():
        yield _card(
            "SQNR",
            words.decibels(sqnr),
            charts.share(sqnr / charts.BEST_DB, charts.level(sqnr)),
            f"output {name}, {fidelity.rows} held-out rows",
        )
    for name in fidelity.uneven:
        yield _card("SQNR", "\N{EN DASH}", "", f"output {name} has another shape: what is found differs")
    coverage = verdict.coverage
    yield _card(
        "Integer coverage",
        words.percent(coverage.share),
        charts.share(coverage.share, "integer"),
        f"of {words.millions(coverage.total_macs)} multiply-accumulates per row",
        "planned: no provider has shown the graph that it runs"
        if coverage.planned
        else f"kernels and the plain meaning of their nodes differ by at most {verdict.optimized_gap:.2g} of a step",
    )


def _latency_card(plain: Latency, quick: Latency, verdict: Verdict) -> Html:
    ratio = quick.ratio
    setting = f"{quick.provider}, {words.times(quick.threads, 'thread', 'threads')}, batch {quick.batch}"
    picture = None
    if ratio is not None:
        reach = max(ratio.high, 1.0) * 1.1
        title = (
            f"{ratio.value:.2f} of the float model's latency, 95 % CI {ratio.low:.2f} to {ratio.high:.2f}; 1 is equal"
        )
        picture = charts.whisker(ratio, 0.0, reach, title, mark=1.0)
    return _card(
        f"Latency ({setting})",
        f"{quick.median_ms:.3f} ms",
        picture,
        quick.words,
        f"float {plain.median_ms:.3f} ms; median of {len(quick.samples_ms)} calls, 95th percentile "
        f"{quick.p95_ms:.3f} ms",
        None if verdict.placed is None else f"measured placement: {verdict.placed.words}",
        None if verdict.formed is None else f"measured products: {verdict.formed.words}",
    )


def _accuracy_card(found: Evaluation) -> Html:
    accuracy, base = found.accuracy, found.reference_accuracy
    assert accuracy is not None
    ends = [accuracy.low, *([base.low] if base is not None else [])]
    picture = charts.whisker(
        accuracy, min(ends) - 0.02, 1.0, f"top-1 with {words.between(accuracy)}", mark=base.value if base else None
    )
    reference = None if base is None else f"float model {words.percent(base.value, 2)} ({words.between(base)})"
    return _card(
        "Top-1",
        words.percent(accuracy.value, 2),
        picture,
        f"{words.between(accuracy)}, {found.rows} labelled rows",
        reference,
        _difference(found),
    )
