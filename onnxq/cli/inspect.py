"""`onnxq inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxq.cli.common import image_options, preprocess_of, stdout_console, terminal_log

if TYPE_CHECKING:
    from onnxq.types.outliers import TensorOutliers

EPILOG = """\b
Examples:
  onnxq inspect model.int8.onnx
  onnxq inspect model.onnx --blocks
  onnxq inspect model.onnx --outliers --data photos/ --preprocess imagenet
"""


@click.command(epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--blocks", is_flag=True, help="Also show the blocks and stages of a float model.")
@click.option("--outliers", is_flag=True, help="Also show which channels of a float model and which samples of --data "
              "stretch the ranges of all others.")  # fmt: skip
@click.option("--data", metavar="DATA", help="Calibration rows, as for quantize; for --outliers.")
@click.option("--samples", type=click.IntRange(1), default=512, show_default=True, help="Most rows.")
@click.option("--batch", type=click.IntRange(1), help="Rows per run.")
@image_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def inspect(model: Path, blocks: bool, outliers: bool, data: str | None, as_json: bool, **options: Any) -> None:
    """What is in MODEL: inputs, operators, layers, grids, integer coverage, provenance."""
    from dataclasses import replace

    from onnxq.errors import UsageError
    from onnxq.pipeline import inspect as run
    from onnxq.report import inspection_document, print_inspection, to_json

    if outliers != (data is not None):
        raise UsageError("--outliers and --data go together: outliers are those of a model on some rows.")
    found = run(model, blocks=blocks)
    if data is not None:
        found = replace(found, outliers=_outliers(model, data, as_json, options))
    if as_json:
        click.echo(to_json(inspection_document(found)))
    else:
        print_inspection(stdout_console(), found)


def _outliers(model: Path, data: str, as_json: bool, options: dict[str, Any]) -> dict[str, TensorOutliers]:
    from onnxq.pipeline.explain import outliers

    names = ("named", "mean", "std", "resize", "scale", "channels", "layout")
    with terminal_log(options["quiet"] or as_json) as log:
        return outliers(
            model,
            data,
            preprocess=preprocess_of(*(options[name] for name in names)),
            samples=options["samples"],
            batch=options["batch"],
            log=log,
        )
