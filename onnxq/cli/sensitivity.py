"""`onnxq sensitivity`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.cli.common import (
    backend_option,
    image_options,
    preprocess_of,
    require_writable,
    stdout_console,
    terminal_log,
)

FIELDS = ("samples", "batch", "rows", "points", "check", "workers", "backend", "cache")

EPILOG = """\b
Examples:
  onnxq sensitivity model.onnx --data calibration/
  onnxq sensitivity model.onnx --data calibration/ --bits 4,2,4/4 --check --save study.json
"""


@click.command(epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="DATA", help="Calibration rows, as for quantize; no labels needed.")
@click.option("--bits", default="4,3,2", show_default=True, metavar="W[/A],...", help="Weight bits to try, with the "
              "bits of the layer's input behind a slash (8 without).")  # fmt: skip
@click.option("--check", is_flag=True, help="Measure the network of every point of the front, too.")
@click.option("--points", type=click.IntRange(2), default=12, show_default=True, help="Points of the front, about.")
@click.option(
    "--rows", type=click.IntRange(1), default=128, show_default=True, help="Rows that errors are measured on."
)
@click.option("--samples", type=click.IntRange(1), default=512, show_default=True, help="Most calibration rows.")
@click.option("--batch", type=click.IntRange(1), help="Rows per run during calibration.")
@click.option("--workers", type=click.IntRange(0), default=0, help="Processes (default: one per processor).")
@backend_option
@click.option("--cache", type=click.Path(path_type=Path, file_okay=False), help="Folder that keeps results from run "
              "to run.")  # fmt: skip
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Write the JSON document there, too.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
@image_options
def sensitivity(model: Path, data: str, bits: str, **options: Any) -> None:
    """Measure how much every layer of MODEL loses at fewer bits, and which choice of bits loses least for its size.

    Every layer is tried at every number of bits with all others at 8; the error is that of the model's outputs.
    """
    from onnxq import graph
    from onnxq.pipeline.study import sensitivity as run
    from onnxq.plan.budgets import read_bits
    from onnxq.report import print_sensitivity, sensitivity_document, to_json

    graph.require_readable(model)
    save = options["save"]
    if save is not None:
        require_writable(save, model)
    names = ("named", "mean", "std", "resize", "scale", "channels", "layout")
    with terminal_log(options["quiet"] or options["as_json"]) as log:
        study = run(
            model,
            data,
            read_bits(bits),
            preprocess=preprocess_of(*(options[name] for name in names)),
            **{name: options[name] for name in FIELDS},
            log=log,
        )
    text = to_json(sensitivity_document(study))
    if save is not None:
        with graph.atomic_path(save) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    if options["as_json"]:
        click.echo(text)
    else:
        print_sensitivity(stdout_console(), study)
