"""`onnxq simplify`."""

from __future__ import annotations

from pathlib import Path

import click

from onnxq.cli.common import require_writable, terminal_log

EPILOG = """\b
Examples:
  onnxq simplify model.onnx -o simple.onnx
"""


@click.command(epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Result.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def simplify(model: Path, output: Path, quiet: bool) -> None:
    """Write the float graph as quantize prepares it by default. The outputs stay the same."""
    from onnxq import graph
    from onnxq.pipeline import simplify as run

    graph.require_readable(model)
    require_writable(output, model)
    with terminal_log(quiet) as log:
        found = run(model, log=log)
        graph.save(found.model, output)
    before = sum(1 for _ in graph.nodes(found.original))
    click.echo(f"{before} nodes -> {sum(1 for _ in graph.nodes(found.model))} nodes; wrote {output}")
    for applied in found.passes:
        if applied.count:
            click.echo(f"  {applied.name}: {applied.count}")
