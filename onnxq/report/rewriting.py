"""What `reparam` did, for people and programs."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.markup import escape

from onnxq.report.document import SCHEMA
from onnxq.types import Rewriting

SHOWN = 8
"""Most reasons printed; the rest is in the JSON."""


def print_reparam(console: Console, run: Rewriting) -> None:
    """Nodes before and after, what each pass did, and what was left as it is and why."""
    gap = "" if run.gap is None else f"; outputs differ by at most {run.gap:.1e} of their range"
    console.print(f"{run.nodes_before} nodes -> {run.nodes_after} nodes{gap}; wrote {escape(run.output)}")
    if run.simplified is not None:
        console.print(f"  not simplified: {escape(run.simplified)}")
    for applied in run.passes:
        if applied.count:
            console.print(f"  {applied.name}: {applied.count}")
    reasons = Counter((found.name, reason) for found in run.passes for reason in found.refused.values())
    if reasons:
        console.print("[bold]left as they are[/]")
    for (name, reason), count in reasons.most_common(SHOWN):
        console.print(f"  {name}: {count} x {escape(reason)}")
    if len(reasons) > SHOWN:
        console.print(f"  ... and {len(reasons) - SHOWN} more reasons (--json lists all)")


def reparam_document(run: Rewriting) -> dict[str, Any]:
    """The same as JSON."""
    return {"schema": SCHEMA, "kind": "reparam", **asdict(run)}
