"""`onnxq sweep`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxq.cli.common import (
    backend_option,
    image_options,
    preprocess_of,
    stdout_console,
    terminal_log,
    write_atomically,
)

if TYPE_CHECKING:
    from onnxq.types.sweep import Swept

EPILOG = """\b
Examples:
  onnxq sweep models/*.onnx --recipes fast balanced --data photos/ -o swept
  onnxq sweep a.onnx b.onnx --recipes w4.toml w8.toml --data rows/ -o swept --report swept.html
"""


class Several(click.Command):
    """A command whose --recipes takes all words up to the next option or model."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Repeat the option before each of its words."""
        spread: list[str] = []
        taking = False
        for word in args:
            if word.startswith("-") or word.endswith(".onnx"):
                taking = word == "--recipes"
                spread += [] if taking else [word]
            else:
                spread += ["--recipes", word] if taking else [word]
        return super().parse_args(ctx, spread)


@click.command(cls=Several, epilog=EPILOG)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--recipes", multiple=True, required=True, metavar="RECIPE...", help="Names of presets, and TOML files.")
@click.option("--data", required=True, metavar="DATA", help="Calibration rows, as for quantize; or a folder that has "
              "them for each model under its name: DATA/MODEL/, DATA/MODEL.npz.")  # fmt: skip
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
              help="Gets MODEL.RECIPE.onnx and MODEL.RECIPE.json for each; the same sweep again goes on from "
              "there.")  # fmt: skip
@click.option("--eval", "labelled", metavar="LABELLED", help="Labelled rows, likewise: reports top-1.")
@click.option("--batch", type=click.IntRange(1), help="Rows per run during calibration.")
@click.option("--workers", type=click.IntRange(0), default=0, help="Jobs at a time (default: one per processor).")
@backend_option
@image_options
@click.option("--report", type=click.Path(path_type=Path), metavar="FILE", help="Write an HTML comparison.")
@click.option("--no-timing", is_flag=True, help="Do not measure latency.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def sweep(models: tuple[Path, ...], recipes: tuple[str, ...], data: str, **options: Any) -> None:
    """Quantize every one of MODELS by every one of RECIPES, and compare.

    A job that fails does not end the others; the exit code is that of the first one that did.
    """
    from onnxq.errors import UsageError
    from onnxq.pipeline.sweep import sweep as run
    from onnxq.report import html_compare, print_sweep, sweep_document, to_json

    report = options["report"]
    if report is not None and len(models) * len(recipes) < 2:
        raise UsageError("--report compares two jobs or more: give another model or recipe.")
    names = ("named", "mean", "std", "resize", "scale", "channels", "layout")
    with terminal_log(options["quiet"] or options["as_json"]) as log:
        runs = run(
            models,
            recipes,
            data,
            options["output"],
            labelled=options["labelled"],
            preprocess=preprocess_of(*(options[name] for name in names)),
            batch=options["batch"],
            workers=options["workers"],
            backend=options["backend"],
            time_it=not options["no_timing"],
            log=log,
        )
    documents = [run.document for run in runs if run.document is not None]
    if report is not None and len(documents) > 1:
        write_atomically(report, html_compare(documents))
    if options["as_json"]:
        click.echo(to_json(sweep_document(runs)))
    else:
        print_sweep(stdout_console(), runs)
    _raise_first(runs)


def _raise_first(runs: tuple[Swept, ...]) -> None:
    """Say how many jobs failed, with the exit code of the first of them."""
    from onnxq.errors import OnnxqError

    failed = [run for run in runs if run.document is None]
    if failed:
        first = failed[0]
        error = OnnxqError(
            f"{len(failed)} of {len(runs)} jobs failed; the first: {first.model} by {first.recipe}: {first.error}"
        )
        error.exit_code = first.exit_code
        raise error
