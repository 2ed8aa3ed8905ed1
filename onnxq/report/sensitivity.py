"""What `sensitivity` found, for people and programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxq.report.document import SCHEMA
from onnxq.types.mixed import BASE, Allocation, Bits, Study, bits_text


def print_sensitivity(console: Console, study: Study) -> None:
    """Error by layer and bits, and the front."""
    known = study.known
    console.print(f"noise over signal at the outputs; everything at 8 bits: {known.base:.3g} ({known.rows} rows)")
    console.print(_layers(study))
    console.print()
    console.print(_front(study))
    if study.additivity is not None:
        console.print(f"rank correlation of predicted and measured: {study.additivity:.2f}")


def _options(study: Study) -> list[Bits]:
    return list(dict.fromkeys(bits for errors in study.known.added.values() for bits in errors if bits != BASE))


def _layers(study: Study) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("error added by")
    options = _options(study)
    for bits in options:
        table.add_column(bits_text(bits), justify="right")
    for group, layers in study.known.groups.items():
        errors = study.known.added[group]
        name = escape(group) + (f" and {len(layers) - 1} with the same input" if len(layers) > 1 else "")
        table.add_row(name, *(f"{errors[bits].output:.2e}" if bits in errors else "-" for bits in options))
    return table


def _front(study: Study) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    measured = study.additivity is not None
    for heading in ("bytes", "of float", "predicted", *(["measured"] if measured else [])):
        table.add_column(heading, justify="right")
    table.add_column("layers")
    for point in study.front:
        size = point.costs["size"]
        figures = [f"{size:,.0f}", f"{100 * size / study.float_bytes:.1f} %", f"{point.degradation:.2e}"]
        if point.measured is not None:
            figures.append(f"{point.measured:.2e}")
        table.add_row(*figures, _counts(study, point))
    return table


def _counts(study: Study, point: Allocation) -> str:
    counts: Counter[Bits] = Counter()
    for group, bits in point.bits.items():
        counts[bits] += len(study.known.groups[group])
    return ", ".join(f"{count} {bits_text(bits)}" for bits, count in sorted(counts.items(), reverse=True))


def sensitivity_document(study: Study) -> dict[str, Any]:
    """The same as JSON; bits are written as w4a8."""
    known = study.known
    return {
        "schema": SCHEMA,
        "kind": "sensitivity",
        "source": study.source,
        "float_bytes": study.float_bytes,
        "base_error": known.base,
        "rows": known.rows,
        "groups": [_group(group, layers, study) for group, layers in known.groups.items()],
        "front": [_point(point) for point in study.front],
        "additivity": study.additivity,
    }


def _group(group: str, layers: tuple[str, ...], study: Study) -> Mapping[str, Any]:
    errors = study.known.added[group].items()
    return {
        "layers": list(layers),
        "added": {bits_text(bits): {"output": entry.output, "block": entry.block} for bits, entry in errors},
    }


def _point(point: Allocation) -> Mapping[str, Any]:
    return {
        "size_bytes": point.costs["size"],
        "predicted": point.degradation,
        "measured": point.measured,
        "bits": {group: bits_text(bits) for group, bits in point.bits.items()},
    }
