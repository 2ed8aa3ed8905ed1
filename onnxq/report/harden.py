"""What `harden` did, as values, for people and for programs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxq.report import words
from onnxq.report.document import SCHEMA
from onnxq.types import Fidelity

SHOWN = 8
"""Most layers printed; the rest is in the JSON."""


@dataclass(frozen=True)
class HardenedLayer:
    """Max |w| / std of one layer's weight, over the whole weight and in its middle output channel.

    Attributes:
        name: Name of its node.
        per_tensor: (before, after) over the whole weight.
        per_channel: (before, after), the median over output channels.
    """

    name: str
    per_tensor: tuple[float, float]
    per_channel: tuple[float, float]


@dataclass(frozen=True)
class LowBits:
    """A quantized model's outputs against the original float model's, on held-out rows.

    Attributes:
        bits: Of the weights; plain rounding, activations of 8 bits.
        per_channel: One weight step per output channel, or one per weight.
        before: From the original weights.
        after: From the hardened weights.
    """

    bits: int
    per_channel: bool
    before: Fidelity
    after: Fidelity


@dataclass(frozen=True)
class Hardening:
    """One run of `harden`.

    Attributes:
        source: The float file.
        output: The file written.
        kept: Whether the hardened weights were kept; if not, the output holds the original ones.
        reason: Why, in words.
        rows: Rows trained on.
        fidelity: The trained float model's outputs against the original's, on held-out rows.
        layers: Ranges of all layers.
        low_bits: What quantization makes of both.
        losses: Distillation and range loss, (first, last) each: means over a tenth of the iterations.
        settings: How it was trained.
        seconds: Wall time of the run.
    """

    source: str
    output: str
    kept: bool
    reason: str
    rows: int
    fidelity: Fidelity
    layers: tuple[HardenedLayer, ...]
    low_bits: tuple[LowBits, ...]
    losses: Mapping[str, tuple[float, float]]
    settings: Mapping[str, object]
    seconds: float


def harden_document(run: Hardening) -> dict[str, Any]:
    """Everything as JSON."""
    return {"schema": SCHEMA, "kind": "harden", **asdict(run)}


def print_harden(console: Console, run: Hardening) -> None:
    """The verdict, ranges of the widest layers, and the low-bit errors before and after."""
    console.print(f"[bold]{'kept' if run.kept else 'NOT kept'}[/]: {escape(run.reason)}; wrote {escape(run.output)}")
    console.print(f"float outputs after training: {_fidelity(run.fidelity)} ({run.fidelity.rows} held-out rows)")
    console.print()
    console.print(_low_bit_table(run))
    console.print()
    console.print(_layer_table(run))
    if len(run.layers) > SHOWN:
        console.print(f"... and {len(run.layers) - SHOWN} more layers (--json lists all)")


def _low_bit_table(run: Hardening) -> Table:
    table = _table("weights, A8, plain rounding", "original", "hardened")
    for entry in run.low_bits:
        scales = "per channel" if entry.per_channel else "per tensor"
        table.add_row(f"W{entry.bits} {scales}", _fidelity(entry.before), _fidelity(entry.after))
    return table


def _layer_table(run: Hardening) -> Table:
    table = _table("max|W|/std", "whole weight", "per channel")
    for layer in sorted(run.layers, key=lambda layer: -layer.per_tensor[0])[:SHOWN]:
        pairs = (f"{before:.2f} -> {after:.2f}" for before, after in (layer.per_tensor, layer.per_channel))
        table.add_row(escape(layer.name), *pairs)
    return table


def _table(*headings: str) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    return table


def _fidelity(found: Fidelity) -> str:
    """The least SQNR of the outputs, and the agreement where there is one."""
    sqnr = f"{min(found.sqnr_db.values()):.1f} dB"
    if found.agreement is None:
        return sqnr
    return f"{sqnr}, agreement {words.percent(found.agreement.value)} ({words.between(found.agreement)})"
