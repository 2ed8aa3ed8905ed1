"""`onnxq compare`."""

from __future__ import annotations

from pathlib import Path

import click

from onnxq.cli.common import require_writable, stdout_console, write_atomically

EPILOG = """\b
Examples:
  onnxq quantize model.onnx --data data/ --preset fast --report fast.html
  onnxq quantize model.onnx --data data/ --preset w4a8 --report w4.html
  onnxq compare fast.html w4.html --report compared.html
"""


@click.command(epilog=EPILOG)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--report", type=click.Path(path_type=Path), metavar="FILE", help="Write an HTML page, too.")
def compare(runs: tuple[Path, ...], report: Path | None) -> None:
    """Put RUNS side by side: reports of quantize, or what its --json printed.

    The first one is what the others are compared with. Runs that judged the same rows are compared row by row, and a
    difference inside the noise is called neither a gain nor a loss.
    """
    from onnxq.report import html_compare, print_compare, read_run

    if report is not None:
        for path in runs:
            require_writable(report, path)
    documents = [read_run(path) for path in runs]
    print_compare(stdout_console(), documents)
    if report is not None:
        write_atomically(report, html_compare(documents))
        click.echo(f"\nwrote {report}")
