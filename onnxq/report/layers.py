"""Every layer of a run on the terminal: bits, and the error behind it as a bar."""

from __future__ import annotations

import math

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxq.report import words
from onnxq.types.details import Details, LayerDetail

BEST_DB = 60.0
"""SQNR that fills a bar."""
WIDTH = 24
"""Characters of a full bar."""


def print_layers(console: Console, details: Details) -> None:
    """One row per layer in graph order, and what stands out in what they read."""
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in ("layer", "op", "bits", "SQNR behind it", "", "its weights", "its input", "work"):
        table.add_column(heading, justify="right" if heading in ("its weights", "its input", "work") else "left")
    total = sum(layer.macs for layer in details.layers) or 1
    for layer in details.layers:
        table.add_row(*_row(layer, details), words.percent(layer.macs / total))
    console.print(table)
    for name, found in details.outliers.items():
        channels, samples = (
            ", ".join(str(one.index) for one in group[:4]) for group in (found.channels, found.samples)
        )
        told = [f"{kind} {text}" for kind, text in (("channels", channels), ("samples", samples)) if text]
        console.print(f"  outliers in {escape(name)}: {'; '.join(told)}")


def _row(layer: LayerDetail, details: Details) -> list[str]:
    source = details.tensors.get(layer.source)
    alone = [layer.weight.sqnr_db if layer.weight is not None else None, source.sqnr_db if source is not None else None]
    costs = ["-" if not layer.integer or cost is None else words.decibels(cost) for cost in alone]
    figure = "-" if layer.sqnr_db is None else words.decibels(layer.sqnr_db)
    bits = f"w{layer.weight_bits}a{layer.input_bits}" if layer.integer else "float"
    return [escape(layer.name), layer.op_type, bits, bar(layer.sqnr_db), figure, *costs]


def bar(sqnr_db: float | None) -> str:
    """An SQNR as a bar that is full at 60 dB; empty where it is unknown."""
    if sqnr_db is None or math.isnan(sqnr_db):
        return ""
    return "\N{FULL BLOCK}" * round(WIDTH * max(0.0, min(sqnr_db / BEST_DB, 1.0)))
