"""The results as values and as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from process import Cost
from scoring import Score

HEAD = (
    "quantizer | status | {metric} | change | agreement % | SQNR dB | KB | size | latency T1 | latency T2 "
    "| int/float kernels | integer coverage | wall s | CPU s | peak MB"
)


@dataclass
class Row:
    """What one quantizer did to one model, filled as the steps succeed; `message` says where it stopped."""

    quantizer: str
    status: str = "failed"
    message: str = ""
    bytes: int | None = None
    cost: Cost | None = None
    score: Score | None = None
    kernels: dict[str, dict[str, int]] | None = None
    integer_coverage: float | None = None
    latency: list[dict[str, float]] = field(default_factory=list)


@dataclass
class Result:
    """A float model and the rows of its quantizers."""

    model: str
    bytes: int
    score: Score | None = None
    message: str = ""
    rows: list[Row] = field(default_factory=list)


def markdown(results: Iterable[Result]) -> str:
    """One titled table per model, with the float file as the first row."""
    return "\n".join(_table(result) for result in results)


def _table(result: Result) -> str:
    score = result.score
    head = HEAD.format(metric=(score.metric if score else None) or "metric").split(" | ")
    rows = f" (n={score.rows})" if score else ""
    lines = [f"### {result.model}{rows}", "", _line(head), _line(["---"] * len(head))]
    value = _percent(score.value if score else None)
    lines.append(_line(["float", "ok", value, "", "", "", f"{result.bytes / 1024:.0f}", *[""] * 8]))
    lines += [_line(_cells(row, result)) for row in result.rows]
    notes = [f"- {row.quantizer}: {row.message}" for row in result.rows if row.message]
    if result.message:
        notes.insert(0, f"- {result.message}")
    return "\n".join([*lines, "", *notes, ""] if notes else [*lines, ""])


def _cells(row: Row, result: Result) -> list[str]:
    score, cost = row.score, row.cost
    before = result.score.value if result.score else None
    after = score.value if score else None
    change = f"{100 * (after - before):+.2f}" if after is not None and before is not None else "-"
    ratios = {int(one["threads"]): f"{one['ratio']:.2f}" for one in row.latency}
    kernels = "/".join(str(sum(group.values())) for group in row.kernels.values()) if row.kernels else "-"
    return [
        row.quantizer,
        row.status,
        _percent(after),
        change,
        _percent(score.agreement if score else None),
        _number(score.sqnr_db if score else None, 1),
        _number(row.bytes / 1024 if row.bytes else None, 0),
        f"{row.bytes / result.bytes:.2f}x" if row.bytes else "-",
        ratios.get(1, "-"),
        ratios.get(2, "-"),
        kernels,
        _number(row.integer_coverage, 3),
        _number(cost.wall_s if cost else None, 1),
        _number(cost.cpu_s if cost else None, 1),
        _number(cost.peak_mb if cost else None, 0),
    ]


def _percent(share: float | None) -> str:
    return _number(None if share is None else 100 * share, 2)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"
