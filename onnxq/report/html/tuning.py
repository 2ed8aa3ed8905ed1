"""What was done to the graph before and after its grids were chosen: rewrites, tuning, and what stayed float."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from onnxq.report import words
from onnxq.report.html import charts
from onnxq.report.html.markup import Html, join, section, table, tag
from onnxq.report.terminal import UNREMARKABLE
from onnxq.types import Applied, BlockResult, Summary, TuningStep


def float_section(run: Summary) -> Html:
    """Nodes that stayed float by reason: those with work in them first, then the others."""
    coverage = run.verdict.coverage if run.verdict is not None else None
    heavy = {node.name: node for node in coverage.floats} if coverage is not None else {}
    reasons = {name: node.reason or run.plan.skipped.get(name, "") for name, node in heavy.items()}
    rest = {name: why for name, why in run.plan.skipped.items() if name not in heavy}
    if not reasons and not rest:
        return section("float", "What stayed float", tag("p", "Nothing: every node of this model runs in integers."))
    total = coverage.total_macs if coverage is not None else 0
    rows = [
        (_names(names), why, words.percent(sum(heavy[name].macs for name in names) / total) if total else "\N{EN DASH}")
        for why, names in _grouped(reasons)
    ]
    work = (
        table(("Nodes", "Why", "Work"), rows, "Products in float, which lower the integer coverage")
        if rows
        else tag("p", "No Conv, Gemm or MatMul.")
    )
    noted = {name: why for name, why in rest.items() if why not in UNREMARKABLE}
    plain = {name: why for name, why in rest.items() if why in UNREMARKABLE}
    others = table(("Nodes", "Why"), [(_names(names), why) for why, names in _grouped(noted)], "Other nodes")
    quiet = table(
        ("Nodes", "Why"),
        [(_names(names), why) for why, names in _grouped(plain)],
        "Nodes without work to speak of, or that follow others",
    )
    folded = tag(
        "details",
        tag("summary", f"{words.times(len(plain), 'more node', 'more nodes')} without work to speak of"),
        quiet,
    )
    return section("float", "What stayed float", work, others if noted else None, folded if plain else None)


def _grouped(reasons: Mapping[str, str]) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for name, why in reasons.items():
        groups.setdefault(why or "no reason is known", []).append(name)
    return sorted(groups.items(), key=lambda entry: -len(entry[1]))


def _names(names: list[str]) -> Html:
    if len(names) == 1:
        return tag("span.name", names[0])
    listed = tag("ul", (tag("li", tag("span.name", name)) for name in names))
    return tag("details", tag("summary", f"{names[0]} and {len(names) - 1} more"), listed)


def tuning_section(run: Summary) -> Html:
    """Errors before and after: of the outputs by stage of tuning, and of every block that learned."""
    return section("tuning", "Tuning", _stages(run.steps), _blocks(run.blocks)) if run.steps or run.blocks else Html()


def _stages(steps: Sequence[TuningStep]) -> Html:
    if not steps:
        return Html()
    said = (
        "Every stage is judged by the model's outputs, on rows that nothing was learned from: noise over signal before "
        "and after. What does not lower it is dropped."
    )
    most = max(max(step.before, step.after) for step in steps)
    rows = (
        (step.name, _error(step.before, most), _error(step.after, most), _change(step.before, step.after), _kept(step))
        for step in steps
    )
    headings = ("Stage", "Error before", "Error after", "Change", "Result")
    return join((tag("p", said), table(headings, rows, "Stages of tuning in order")))


def _blocks(steps: Sequence[BlockResult]) -> Html:
    if not steps:
        return Html()
    kept = sum(step.kept for step in steps)
    most = max(max(step.before, step.after) for step in steps)
    said = (
        f"{kept} of {words.times(len(steps), 'step was', 'steps were')} kept. Errors are noise over signal at "
        "the block's outputs, on rows that the step did not learn from; a step that did not lower its block's error "
        "was dropped."
    )
    headings = ("Block", "Method", "Error before", "Error after", "Change", "Result", "Time")
    rows = (
        (
            step.block,
            step.method,
            _error(step.before, most),
            _error(step.after, most),
            _change(step.before, step.after),
            _kept(step),
            f"{step.seconds:.1f} s",
        )
        for step in steps
    )
    return join((tag("h3", "Block by block"), tag("p", said), table(headings, rows, "Tuning steps in order")))


def _kept(step: BlockResult | TuningStep) -> Html:
    return tag(f"span.chip.{'int' if step.kept else 'float'}", "kept" if step.kept else "dropped")


def _error(error: float, most: float) -> Html:
    picture = charts.share(error / most if most else 0.0)
    return tag("span.measure", picture, tag("span.figure", f"{error:.2e}"))


def _change(before: float, after: float) -> str:
    if not before:
        return "\N{EN DASH}"
    return f"{100 * (after / before - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")


def rewrites_section(passes: Sequence[Applied]) -> Html:
    """What each rewrite of the float graph did."""
    done = [applied for applied in passes if applied.count or applied.refused]
    rows = ((applied.name, applied.count, _refused(applied.refused)) for applied in done)
    said = tag("p", "Before quantization the float graph was rewritten; each rewrite keeps what the model computes.")
    shown = table(("Rewrite", "Made", "Refused"), rows, "Rewrites that found something")
    return section("rewrites", "Rewrites", said, shown) if done else Html()


def _refused(refused: Mapping[str, str]) -> Html:
    if not refused:
        return join("\N{EN DASH}")
    reasons: Iterable[Html] = (tag("li", tag("span.name", name), f": {why}") for name, why in refused.items())
    return tag("details", tag("summary", str(len(refused))), tag("ul", reasons))
