"""What a sweep gave, for people and programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxq.report import words
from onnxq.report.document import SCHEMA
from onnxq.types import Interval, compare_words
from onnxq.types.sweep import Swept

COLUMNS = ("model", "recipe", "size", "of float", "SQNR", "agreement", "top-1", "integer", "latency")


def sweep_document(runs: Sequence[Swept]) -> dict[str, Any]:
    """All jobs; `run` is the document of `onnxq quantize --json`, null for one that failed."""
    return {
        "schema": SCHEMA,
        "kind": "sweep",
        "jobs": [
            {
                "model": run.model,
                "recipe": run.recipe,
                "error": run.error or None,
                "exit_code": run.exit_code,
                "known": run.known,
                "run": run.document,
            }
            for run in runs
        ],
    }


def print_sweep(console: Console, runs: Sequence[Swept]) -> None:
    """One line per job, with the float model's latency and top-1 as the reference; then what failed."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in COLUMNS:
        table.add_column(heading, justify="left" if heading in ("model", "recipe", "latency") else "right")
    last = ""
    for run in runs:
        figures = ["failed"] if run.document is None else _figures(run.document)
        table.add_row(escape(PurePath(run.model).name) if run.model != last else "", escape(run.recipe), *figures)
        last = run.model
    console.print(table)
    for run in runs:
        if run.error:
            console.print(
                f"[yellow]failed:[/] {escape(PurePath(run.model).name)} by {escape(run.recipe)}: {escape(run.error)}"
            )
        for warning in (run.document or {}).get("verdict", {}).get("warnings", ()):
            console.print(
                f"[yellow]warning:[/] {escape(PurePath(run.model).name)} by {escape(run.recipe)}: {escape(warning)}"
            )


def _figures(document: Mapping[str, Any]) -> list[str]:
    verdict, evaluation = document["verdict"], document["evaluation"]
    worst = min((-1.0 if value is None else value for value in verdict["sqnr_db"].values()), default=None)
    size, whole = verdict["quantized_bytes"], max(verdict["float_bytes"], 1)
    return [
        words.size(size),
        f"{100 * size / whole:.1f} %",
        "-" if worst is None else f"{worst:.1f} dB",
        _percent(verdict["agreement"]),
        _percent(evaluation and evaluation["accuracy"]),
        f"{100 * verdict['integer_coverage']:.1f} %",
        _latency(verdict["latency_ratio"]),
    ]


def _percent(interval: Mapping[str, float] | None) -> str:
    if not interval:
        return "-"
    return f"{100 * interval['value']:.2f} ± {50 * (interval['high'] - interval['low']):.2f} %"


def _latency(ratio: Mapping[str, float] | None) -> str:
    return "-" if ratio is None else compare_words(Interval(ratio["value"], ratio["low"], ratio["high"]))
