"""`onnxq benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxq.cli.common import integers, stdout_console, terminal_log

if TYPE_CHECKING:
    from onnxq.types import Latency


EPILOG = """\b
Examples:
  onnxq benchmark model.onnx model.int8.onnx
  onnxq benchmark model.onnx model.int8.onnx --threads 1,4 --batch 1,8 --json
  onnxq benchmark bert.onnx --shape input_ids:1,128 --data calibration/
"""


@click.command(epilog=EPILOG)
@click.argument("models", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--provider", "providers", multiple=True, help="cpu, cuda, tensorrt, openvino; repeatable. Default: all "
              "that are here.")  # fmt: skip
@click.option("--threads", default="1", callback=integers, help="Intra-op threads, e.g. 1,4.", show_default=True)
@click.option("--batch", default="1", callback=integers, help="Rows per call, e.g. 1,8.", show_default=True)
@click.option(
    "--shape",
    "shapes",
    multiple=True,
    metavar="INPUT:1,3,224,224",
    help="Size of a dynamic input; repeatable.",
)
@click.option("--data", metavar="DATA", help="Real rows instead of random ones.")
@click.option("--seconds", type=float, default=3.0, show_default=True, help="Time per model and setting.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document with all raw samples.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def benchmark(
    models: tuple[Path, ...],
    providers: tuple[str, ...],
    threads: tuple[int, ...],
    batch: tuple[int, ...],
    shapes: tuple[str, ...],
    data: str | None,
    seconds: float,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure the latency of MODELS side by side; ratios are to the first one.

    All models of a setting are called in turns in one process, so that whatever else the machine does hits all of
    them alike.
    """
    from onnxq import bench, calibrate, graph, runtime
    from onnxq.report import benchmark_document, print_benchmark, to_json

    for path in models:
        graph.require_readable(path)
    feeds = None
    if data is not None:
        specs = runtime.Session(graph.require_readable(models[0])).inputs
        feeds = next(iter(calibrate.open_data(data, specs, samples=max(batch))))
    with terminal_log(quiet or as_json) as log:
        log.stage("Measuring")
        found = bench.measure(
            [graph.require_readable(path) for path in models],
            providers=providers or runtime.available_providers(),
            threads=threads,
            batches=batch,
            shapes=bench.parse_shapes(list(shapes)) if shapes else None,
            feeds=feeds,
            seconds=seconds,
            progress=log.note,
        )
    named = _with_names(found, models)
    if as_json:
        click.echo(to_json(benchmark_document(named, runtime.machine())))
    else:
        print_benchmark(stdout_console(), named)


def _with_names(found: tuple[Latency, ...], models: tuple[Path, ...]) -> list[Latency]:
    """Latencies under the names that the user typed."""
    from dataclasses import replace

    typed = {str(path.resolve()): str(path) for path in models}
    return [replace(latency, model=typed.get(latency.model, latency.model)) for latency in found]
