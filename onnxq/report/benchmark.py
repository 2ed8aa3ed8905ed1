"""What `benchmark` found, for people and programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxq.report.document import SCHEMA
from onnxq.types import Comparison, Latency, Peak, Roof

NUMBERS = ("threads", "batch", "median", "p95", "MACs", "bytes", "of the peak", "then", "now")


def print_benchmark(console: Console, latencies: Sequence[Latency], roofs: Sequence[Roof | None] = ()) -> None:
    """One row per model and setting; ratios are to the first model of the setting.

    Args:
        console: Where to.
        latencies: What was measured.
        roofs: For each of them how near it is to the machine's peak; empty where that was not asked for.
    """
    table = _table(
        "model", "provider", "threads", "batch", "median", "p95", *(_WORK if roofs else ()), "against the first"
    )
    for index, latency in enumerate(latencies):
        table.add_row(
            escape(latency.model),
            latency.provider,
            str(latency.threads),
            str(latency.batch),
            f"{latency.median_ms:.3f} ms",
            f"{latency.p95_ms:.3f} ms",
            *(_work(roofs[index]) if roofs else ()),
            latency.words,
        )
    console.print(table)
    for peak in dict.fromkeys(roof.peak for roof in roofs if roof is not None):
        console.print(_peak(peak))


_WORK = ("MACs", "bytes", "of the peak")


def _work(roof: Roof | None) -> tuple[str, ...]:
    if roof is None:
        return "-", "-", "-"
    macs = roof.work.integer_macs + roof.work.float_macs
    return f"{macs / 1e6:.2f} M", f"{roof.work.bytes / 1e6:.2f} MB", f"{100 * roof.share:.0f} %"


def _peak(peak: Peak) -> str:
    threads = f"{peak.threads} thread{'s' if peak.threads != 1 else ''}" if peak.threads else "default threads"
    return (
        f"peak of this machine through onnxruntime, {threads}: int8 {peak.int8_gmacs:.0f}, float32 "
        f"{peak.float_gmacs:.0f} x 10^9 multiply-accumulates (MACs) per second; weights arrive at "
        f"{peak.stream_gbytes:.0f} GB/s"
    )


def print_changes(console: Console, found: Comparison) -> None:
    """What changed since an older run."""
    console.print(f"\n[bold]against {escape(PurePath(found.old).name)}[/]")
    for difference in found.machine_differs:
        console.print(f"  another machine: {escape(difference)}")
    if found.changes:
        table = _table("model", "provider", "threads", "batch", "then", "now", "now / then", "beyond the noise?")
        for change in found.changes:
            table.add_row(
                escape(change.model),
                change.provider,
                str(change.threads),
                str(change.batch),
                f"{change.then_ms:.3f} ms",
                f"{change.now_ms:.3f} ms",
                f"{change.times.value:.2f} ({change.times.low:.2f}-{change.times.high:.2f})",
                change.words,
            )
        console.print(table)
    if found.missing:
        console.print(f"  {found.missing} of this run's rows are not in it")


def _table(*headings: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in NUMBERS else "left")
    return table


def benchmark_document(
    latencies: Sequence[Latency],
    machine: Mapping[str, object],
    roofs: Sequence[Roof | None] = (),
    comparison: Comparison | None = None,
) -> dict[str, Any]:
    """The result of `benchmark`, raw samples included; `bench.read_history` reads it back.

    Args:
        latencies: What was measured.
        machine: Where.
        roofs: For each of them how near it is to the machine's peak; empty where that was not asked for.
        comparison: With an older run.
    """
    entries = [asdict(latency) for latency in latencies]
    for entry, roof in zip(entries, roofs, strict=False):
        entry["roofline"] = None if roof is None else _roof(roof)
    peaks = dict.fromkeys(roof.peak for roof in roofs if roof is not None)
    return {
        "schema": SCHEMA,
        "kind": "benchmark",
        "machine": dict(machine),
        "peaks": [asdict(peak) for peak in peaks],
        "latencies": entries,
        "comparison": None if comparison is None else _comparison(comparison),
    }


def _roof(roof: Roof) -> dict[str, float]:
    return {**asdict(roof.work), "least_ms": roof.least_ms, "best_ms": roof.best_ms, "share_of_peak": roof.share}


def _comparison(found: Comparison) -> dict[str, Any]:
    entries = [{**asdict(change), "exceeds_noise": change.exceeds} for change in found.changes]
    return {**asdict(found), "changes": entries}
