"""Two or more runs of `quantize`, from their documents: what is shown side by side, and what may be said of it.

Where two runs judged the same rows, a paired test tells a difference from the noise (McNemar). Where they did not, and
for latencies, the two 95 % intervals must not overlap, which is stricter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxq.bench.stats import paired
from onnxq.errors import InputError, UsageError
from onnxq.report import words
from onnxq.report.document import SCHEMA
from onnxq.types import Interval

Document = Mapping[str, Any]
NONE = "\N{EN DASH}"
_EMBEDDED = re.compile(r'<script type="application/json" id="document">(.*?)</script>', re.DOTALL)


def read_run(path: Path) -> Document:
    """The document of a run, from what `quantize --json` printed or from a report.

    Raises:
        InputError: It cannot be read, or holds no such document.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    found = _EMBEDDED.search(text)
    try:
        document = json.loads(found[1] if found else text)
    except ValueError:
        document = None
    if not is_run(document):
        raise InputError(f"{path} is neither a report nor a JSON document of `onnxq quantize`, schema {SCHEMA}.")
    return dict(document)


def is_run(document: object) -> bool:
    """Whether this is a document of `quantize`, of this version."""
    return isinstance(document, Mapping) and (document.get("kind"), document.get("schema")) == ("quantize", SCHEMA)


def require_runs(reports: Sequence[Document]) -> None:
    """Refuse what cannot be compared.

    Raises:
        UsageError: There are fewer than two, or one is no document of a run.
    """
    if len(reports) < 2:
        raise UsageError("a comparison takes two reports or more.")
    for index, report in enumerate(reports):
        if not is_run(report):
            raise UsageError(f"report {index + 1} is no document of `onnxq quantize --json`, schema {SCHEMA}.")


def names(reports: Sequence[Document]) -> list[str]:
    """The files written, or the presets of dry runs, numbered."""
    found: list[str] = []
    for index, report in enumerate(reports):
        written = report.get("output")
        name = PurePath(written).name if written else f"{report['recipe'].get('preset', 'run')} (dry run)"
        found.append(f"{index + 1}: {name}")
    return found


def models(reports: Sequence[Document]) -> list[str]:
    """Names of the float files."""
    return sorted({PurePath(report["source"]).name for report in reports})


def accuracy(report: Document) -> Interval | None:
    """Top-1 on labelled rows."""
    return _interval((report.get("evaluation") or {}).get("accuracy"))


def agreement(report: Document) -> Interval | None:
    """Share of held-out rows with the float model's class."""
    return _interval((report.get("verdict") or {}).get("agreement"))


def latency(report: Document) -> Interval | None:
    """Share of the float model's latency."""
    return _interval((report.get("verdict") or {}).get("latency_ratio"))


def _interval(found: Document | None) -> Interval | None:
    if found is None or None in (found["value"], found["low"], found["high"]):
        return None
    return Interval(found["value"], found["low"], found["high"])


def sqnr(report: Document) -> float | None:
    """Of the worst output; JSON has no infinity, so null stands for it."""
    found = (report.get("verdict") or {}).get("sqnr_db") or {}
    return min((float("inf") if value is None else value for value in found.values()), default=None)


def judged(first: Interval, other: Interval, *, rising: bool) -> str:
    """What may be said of two figures with intervals.

    Args:
        first: The reference's figure.
        other: The same of another run.
        rising: More is better.
    """
    if other.low <= first.high and first.low <= other.high:
        return "inside the noise"
    return "better than run 1" if (other.value > first.value) == rising else "worse than run 1"


def against_accuracy(first: Document, other: Document) -> str | None:
    """What may be said of two accuracies; None where one is missing."""
    return _rows_or_intervals(
        (first.get("evaluation") or {}).get("correct"),
        (other.get("evaluation") or {}).get("correct"),
        accuracy(first),
        accuracy(other),
    )


def against_agreement(first: Document, other: Document) -> str | None:
    """What may be said of two agreements; None where one is missing."""
    return _rows_or_intervals(
        (first.get("verdict") or {}).get("agreed"),
        (other.get("verdict") or {}).get("agreed"),
        agreement(first),
        agreement(other),
    )


def against_latency(first: Document, other: Document) -> str | None:
    """What may be said of two latencies; None where one is missing."""
    return _rows_or_intervals(None, None, latency(first), latency(other), rising=False)


def _rows_or_intervals(
    first: Document | None, other: Document | None, one: Interval | None, two: Interval | None, *, rising: bool = True
) -> str | None:
    """A paired test where both saw the same rows, else by intervals."""
    if one is None or two is None:
        return None
    if first is None or other is None or first["rows"] != other["rows"]:
        return judged(one, two, rising=rising)
    return paired(_right(other), _right(first)).words


def _right(found: Document) -> npt.NDArray[np.bool_]:
    return np.array([row == "1" for row in found["right"]], np.bool_)


def print_compare(console: Console, reports: Sequence[Document]) -> None:
    """One row per run, and what may be said of each against the first."""
    require_runs(reports)
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in ("run", "size", "of float", "SQNR", "top-1", "agreement", "integers", "latency, of float"):
        table.add_column(heading, justify="left" if heading == "run" else "right")
    for name, report in zip(names(reports), reports, strict=True):
        table.add_row(escape(name), *_cells(report))
    console.print(table)
    if len(models(reports)) > 1:
        console.print(f"of different models ({escape(', '.join(models(reports)))}): none is called better than another")
        return
    console.print("\n[bold]against run 1[/]")
    for name, report in zip(names(reports)[1:], reports[1:], strict=True):
        console.print(f"  {escape(name)}: {'; '.join(_against(reports[0], report)) or 'nothing was measured'}")


def _cells(report: Document) -> list[str]:
    verdict = report.get("verdict")
    if verdict is None:
        return [NONE] * 7
    small, big = verdict["quantized_bytes"], verdict["float_bytes"]
    figures = (_figure(found) for found in (accuracy(report), agreement(report)))
    return [
        words.size(small),
        words.percent(small / max(big, 1)),
        words.decibels(sqnr(report)),
        *figures,
        words.percent(verdict["integer_coverage"]),
        _figure(latency(report)),
    ]


def _figure(found: Interval | None) -> str:
    return NONE if found is None else words.ranged(found)


def _against(first: Document, other: Document) -> list[str]:
    said = {
        "top-1": against_accuracy(first, other),
        "agreement": against_agreement(first, other),
        "latency": against_latency(first, other),
    }
    return [f"{what} {text}" for what, text in said.items() if text is not None]
