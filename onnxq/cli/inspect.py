"""`onnxq inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from onnxq.cli.common import stdout_console


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--blocks", is_flag=True, help="Also show the blocks and stages of a float model.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def inspect(model: Path, blocks: bool, as_json: bool) -> None:
    """What is in MODEL: inputs, operators, layers, grids, integer coverage, provenance."""
    from onnxq.pipeline import inspect as run
    from onnxq.report import inspection_document, print_inspection, to_json

    found = run(model, blocks=blocks)
    if as_json:
        click.echo(to_json(inspection_document(found)))
    else:
        print_inspection(stdout_console(), found)
