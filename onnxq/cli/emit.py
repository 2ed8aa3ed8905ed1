"""`onnxq emit`."""

from __future__ import annotations

from pathlib import Path

import click

from onnxq.cli.common import require_writable, terminal_log

EPILOG = """\b
Examples:
  onnxq emit plan.json -o again.onnx
  onnxq emit plan.json --target tensorrt -o model.trt.onnx
  onnxq emit plan.json --target openvino --model elsewhere/model.onnx -o model.ov.onnx
"""


@click.command(epilog=EPILOG)
@click.argument("plan", type=click.Path(path_type=Path))
@click.option("--target", metavar="NAME", help="cpu, tensorrt, cuda, openvino, qnn or web; default: the plan's own.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Result.")
@click.option("--model", type=click.Path(path_type=Path), help="The float model, where it is not in its old place.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def emit(plan: Path, target: str | None, output: Path, model: Path | None, quiet: bool) -> None:
    """Write the model of PLAN, which quantize --save-plan kept, for the same or another target.

    Nothing is calibrated again. The plan's own target gives the same bytes as quantize did; for another one, what
    changes is said.
    """
    from onnxq import graph
    from onnxq.pipeline import reemit
    from onnxq.types.target import TARGETS

    require_writable(output, plan)
    if model is not None:
        graph.require_readable(model)
        require_writable(output, model)
    with terminal_log(quiet) as log:
        found = reemit(plan, target, model=model, log=log)
        require_writable(output, found.source)
        graph.save(found.model, output)
    made = found.plan
    integers = f"{len(made.weights)} layers in integers, {len(made.tensors)} quantized tensors"
    click.echo(f"target {made.target}: " + (f"{len(made.half)} nodes in float16" if made.half else integers))
    for sentence in (*found.changes, *filter(None, [TARGETS[made.target].note])):
        click.echo(f"  {sentence}")
    click.echo(f"wrote {output}")
