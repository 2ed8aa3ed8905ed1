"""`onnxq reparam`."""

from __future__ import annotations

from pathlib import Path

import click

from onnxq.cli.common import require_writable, stdout_console, terminal_log

EPILOG = """\b
Examples:
  onnxq reparam model.onnx -o fused.onnx
  onnxq reparam model.onnx -o fused.onnx --without FuseBranches --json
"""


@click.command(epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Result.")
@click.option("--floor-db", type=float, metavar="DB", help="Leave parallel branches apart whose fused kernel would "
              "keep less than this signal-to-noise ratio at 8 bits, and take identities out of those that keep less; "
              "quantize uses 32.")  # fmt: skip
@click.option("--equalize", is_flag=True, help="Equalise the channels of neighbouring layers, too.")
@click.option("--without", multiple=True, metavar="REWRITE", help="Leave a rewrite out; repeatable.")
@click.option("--shape", "shapes", multiple=True, metavar="INPUT:1,3,224,224", help="Size of a dynamic input; "
              "repeatable.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def reparam(
    model: Path,
    output: Path,
    floor_db: float | None,
    equalize: bool,
    without: tuple[str, ...],
    shapes: tuple[str, ...],
    as_json: bool,
    quiet: bool,
) -> None:
    """Rewrite the float MODEL into a form that is easier to quantize and computes the same.

    Parallel branches become one convolution, BatchNormalization and constant factors move into weights, and more;
    every rewrite is checked by running the model before and after.
    """
    from onnxq import bench, graph
    from onnxq.pipeline import reparam as run
    from onnxq.report import print_reparam, reparam_document, to_json

    graph.require_readable(model)
    require_writable(output, model)
    with terminal_log(quiet or as_json) as log:
        sizes = bench.parse_shapes(shapes)
        found = run(model, floor_db=floor_db, equalize=equalize, without=without, shapes=sizes, log=log)
        graph.save(found.model, output)
    summary = found.summary(output)
    if as_json:
        click.echo(to_json(reparam_document(summary)))
    else:
        print_reparam(stdout_console(), summary)
