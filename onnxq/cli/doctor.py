"""`onnxq doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from onnxq.cli.common import stdout_console

if TYPE_CHECKING:
    from rich.console import Console

    from onnxq.pipeline.doctor import Diagnosis


EPILOG = """\b
Examples:
  onnxq doctor
  onnxq doctor --json
"""


@click.command(epilog=EPILOG)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def doctor(as_json: bool) -> None:
    """What this machine offers: providers, processor, memory, versions, optional parts, and what to do about gaps."""
    from dataclasses import asdict

    from onnxq.pipeline.doctor import diagnose
    from onnxq.report import to_json
    from onnxq.report.document import SCHEMA

    found = diagnose()
    if as_json:
        click.echo(to_json({"schema": SCHEMA, "kind": "doctor", **asdict(found)}))
    else:
        _print(stdout_console(), found)


def _print(console: Console, found: Diagnosis) -> None:
    from rich.markup import escape

    machine = found.machine
    console.print(f"[bold]onnxq {found.version}[/], Python {machine.python}, {machine.system}, {machine.architecture}")
    console.print(f"processors  {machine.usable} of {machine.processors} usable{_memory(found)}")
    console.print("features    " + ", ".join(f"{name} {_yes(has)}" for name, has in machine.features.items()))
    console.print("providers   " + ", ".join(f"{name} {state}" for name, state in found.providers.items()))
    if found.learning_device is not None:
        console.print(f"learning    on {found.learning_device} (PyTorch)")
    console.print()
    console.print(_table(found))
    console.print()
    if not found.advice:
        console.print("nothing to do")
    for line in found.advice:
        console.print(f"[yellow]advice:[/] {escape(line)}")


def _memory(found: Diagnosis) -> str:
    total, free = found.machine.memory_bytes, found.machine.free_bytes
    if total is None or free is None:
        return ""
    return f"; memory {free / 1e9:.1f} of {total / 1e9:.1f} GB free"


def _yes(has: bool | None) -> str:
    return "unknown" if has is None else "yes" if has else "no"


def _table(found: Diagnosis) -> object:
    from rich.markup import escape
    from rich.table import Table

    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in ("part", "version", "for"):
        table.add_column(heading)
    for part in found.parts:
        table.add_row(part.name, part.version or "missing", escape(part.purpose))
    return table
