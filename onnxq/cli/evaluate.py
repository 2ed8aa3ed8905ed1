"""`onnxq evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from onnxq.cli.common import image_options, preprocess_of, stdout_console

EPILOG = """\b
Examples:
  onnxq evaluate model.int8.onnx --data labelled.npz
  onnxq evaluate model.int8.onnx --data photos_by_class/ --preprocess imagenet --reference model.onnx
"""


@click.command(epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="LABELLED", help="Rows with labels: an .npz with `label`, or a folder "
              "with one sub-folder of images per class.")  # fmt: skip
@click.option("--reference", type=click.Path(path_type=Path), help="Compare with this model; labels are optional then.")
@click.option("--samples", type=int, help="Most rows (default all).")
@click.option("--batch", type=int, help="Rows per run.")
@click.option("--provider", default="cpu", show_default=True, help="cpu, cuda, tensorrt or openvino.")
@click.option("--threads", type=int, default=0, help="Intra-op threads (default: the runtime decides).")
@image_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def evaluate(model: Path, data: str, reference: Path | None, provider: str, threads: int, **options: Any) -> None:
    """Top-1 accuracy of MODEL, or its agreement and SQNR against --reference."""
    from onnxq.pipeline import evaluate as run
    from onnxq.report import evaluation_document, print_evaluation, to_json
    from onnxq.runtime import SessionConfig

    names = ("named", "mean", "std", "resize", "scale", "channels", "layout")
    found = run(
        model,
        data,
        reference=reference,
        preprocess=preprocess_of(*(options[name] for name in names)),
        samples=options["samples"],
        batch=options["batch"],
        config=SessionConfig(provider=provider, threads=threads),
    )
    if options["as_json"]:
        click.echo(to_json(evaluation_document(str(model), found)))
    else:
        print_evaluation(stdout_console(), model.name, found)
