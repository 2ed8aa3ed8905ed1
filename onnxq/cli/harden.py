"""`onnxq harden`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxq.cli.common import image_options, preprocess_of, require_writable, stdout_console, terminal_log

if TYPE_CHECKING:
    from onnxq.pipeline.harden import HardenSettings

KINDS = ("linf", "margin", "soft-min-max")
FIELDS = ("kind", "strength", "iterations", "epochs", "rate", "batch", "samples", "floor_db", "device", "seed")


EPILOG = """\b
Examples:
  onnxq harden model.onnx --data calibration/ -o hardened.onnx
  onnxq harden model.onnx --data calibration/ -o hardened.onnx --per-tensor --epochs 10
"""


@click.command(epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="DATA", help="Unlabelled rows: a folder of images, .npz or .npy; one "
              ".npz or .npy; or module:callable.")  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Result, a float model.")
@click.option("--kind", type=click.Choice(KINDS), help="What is made small (default margin: the mean of the largest "
              "weights).")  # fmt: skip
@click.option("--strength", type=float, help="Of the range loss (default 0.1).")
@click.option("--per-tensor", is_flag=True, help="Harden for one weight scale per tensor instead of one per channel.")
@click.option("--epochs", type=int, help="Times that every row is seen (default 40).")
@click.option("--iterations", type=int, help="Training steps, instead of --epochs.")
@click.option("--rate", type=float, help="Learning rate, in units of each weight's root mean square (default 0.002).")
@click.option("--floor-db", type=float, metavar="DB", help="Float outputs must keep this signal-to-noise ratio to the "
              "original's, or nothing changes (default 15).")  # fmt: skip
@click.option("--samples", type=int, help="Most rows (default 512).")
@click.option("--batch", type=int, help="Rows per step (default 32).")
@click.option("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one.")
@click.option("--seed", type=int, help="Of everything random (default 0).")
@image_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def harden(model: Path, data: str, output: Path, **options: Any) -> None:
    """Fine-tune the float MODEL so that low-bit weights hurt it less. Needs PyTorch, but no labels.

    The model teaches itself while a range loss (R2) takes the outliers out of its weights. Rows that were held out
    decide whether the result is kept. It is a float model again, with the same inputs and outputs.
    """
    from onnxq import graph
    from onnxq.pipeline.harden import harden as run
    from onnxq.report import harden_document, print_harden, to_json

    graph.require_readable(model)
    require_writable(output, model)
    settings = _settings(options)
    names = ("named", "mean", "std", "resize", "scale", "channels", "layout")
    preprocess = preprocess_of(*(options[name] for name in names))
    with terminal_log(options["quiet"] or options["as_json"]) as log:
        found = run(model, data, settings, preprocess=preprocess, log=log)
        report = found.save(output)
    if options["as_json"]:
        click.echo(to_json(harden_document(report)))
    else:
        print_harden(stdout_console(), report)


def _settings(options: dict[str, Any]) -> HardenSettings:
    from onnxq.errors import UsageError
    from onnxq.pipeline.harden import HardenSettings

    if options["epochs"] is not None and options["iterations"] is not None:
        raise UsageError("give --epochs or --iterations, not both.")
    given = {name: options[name] for name in FIELDS if options[name] is not None}
    return HardenSettings(**given, per_channel=not options["per_tensor"])
