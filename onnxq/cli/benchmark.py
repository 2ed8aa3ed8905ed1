"""`onnxq benchmark`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from onnxq.cli.common import integers, require_writable, stdout_console, terminal_log, write_atomically

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
@click.option("--no-peak", is_flag=True, help="Do not say how near models come to the machine's peak.")
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Keep the JSON document for --compare.")
@click.option("--compare", type=click.Path(path_type=Path), metavar="OLD.json", help="What changed since that run.")
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
    no_peak: bool,
    save: Path | None,
    compare: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure the latency of MODELS side by side; ratios are to the first one.

    All models of a setting are called in turns in one process, so that whatever else the machine does hits all of
    them alike.
    """
    from onnxq import bench, calibrate, graph, runtime
    from onnxq.report import benchmark_document, print_benchmark, print_changes, to_json

    paths = [graph.require_readable(path) for path in models]
    if save is not None:
        require_writable(save, paths[0])
    old = bench.read_history(compare) if compare is not None else None
    sizes = bench.parse_shapes(list(shapes)) if shapes else None
    feeds = None
    if data is not None:
        specs = runtime.Session(paths[0]).inputs
        feeds = next(iter(calibrate.open_data(data, specs, samples=max(batch))))
    with terminal_log(quiet or as_json) as log:
        log.stage("Measuring")
        found = bench.measure(
            paths,
            providers=providers or runtime.available_providers(),
            threads=threads,
            batches=batch,
            shapes=sizes,
            feeds=feeds,
            seconds=seconds,
            progress=log.note,
        )
        if not no_peak:
            log.stage("Measuring the machine's peak")
        roofs = () if no_peak else bench.roofs(paths, found, shapes=sizes, feeds=feeds)
    named = _with_names(found, models)
    changes = old.compare(named, runtime.machine()) if old is not None else None
    document = benchmark_document(named, runtime.machine(), roofs, changes)
    if save is not None:
        write_atomically(save, to_json(document) + "\n")
    if as_json:
        click.echo(to_json(document))
        return
    print_benchmark(stdout_console(), named, roofs)
    if changes is not None:
        print_changes(stdout_console(), changes)


def _with_names(found: tuple[Latency, ...], models: tuple[Path, ...]) -> list[Latency]:
    """Latencies under the names that the user typed."""
    from dataclasses import replace

    typed = {str(path.resolve()): str(path) for path in models}
    return [replace(latency, model=typed.get(latency.model, latency.model)) for latency in found]
