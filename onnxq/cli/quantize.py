"""`onnxq quantize`."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxq.cli.common import (
    backend_option,
    image_options,
    preprocess_of,
    require_writable,
    stdout_console,
    terminal_log,
    write_atomically,
)

if TYPE_CHECKING:
    from onnxq.pipeline import QuantizedModel
    from onnxq.types import Log, Summary

EPILOG = """\b
Examples:
  onnxq quantize resnet.onnx --data photos/ --preprocess imagenet
  onnxq quantize bert.onnx --data calibration/ -o bert.int8.onnx --report bert.html
  onnxq quantize model.onnx --data reader:batches --preset fast --dry-run
  onnxq quantize model.onnx --data data/ --preset w4a8 --eval labelled.npz
  onnxq quantize model.onnx --data data/ --max-size 0.15x --keep-float '*/head/*'
  onnxq quantize model.onnx --data data/ --recipe earlier.int8.onnx
"""


@click.command(epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="DATA", help="Calibration rows: a folder of images, .npz or .npy; one "
              ".npz or .npy; or module:callable.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Result; default: MODEL.int8.onnx beside it.")
@click.option("--preset", metavar="NAME", help="fast: min-max ranges. balanced (default): ranges by output error, "
              "layers' means and spreads tuned. light: the same, for bit budgets. advanced: weights, steps and biases "
              "learned with PyTorch; minutes. accurate: the same, longer. repapq, aquant, repq-vit: these "
              "methods. fastest: balanced, with placement and forms of products by measured time.")  # fmt: skip
@click.option("--recipe", type=click.Path(path_type=Path), help="TOML file, or the ONNX file "
              "of an earlier run; options given here replace its values.")  # fmt: skip
@click.option("--target", metavar="NAME", help="What the file is for: auto (this machine, default), cpu, tensorrt, "
              "cuda, openvino, qnn or web.")  # fmt: skip
@click.option("--placement", metavar="NAME", help="auto (default): layers go back to float by measured time if the "
              "result would be slower than float. measured: by time anyway, and products in their fastest form. "
              "rules: never.")  # fmt: skip
@click.option("--threads", type=int, help="Intra-op threads that latency is measured with (default 1).")
@click.option("--weight-bits", type=int, help="2 to 8 (default 8); below 8 only the file shrinks, not the time.")
@click.option("--codebook-bits", type=int, help="1 to 4: weights become indices into codebooks of their best values, "
              "instead of --weight-bits.")  # fmt: skip
@click.option("--activation-bits", type=int, help="2 to 8 (default 8) or 16; only 8 is fast on CPUs.")
@click.option("--first-last", type=int, help="Bits of the first and last layer (default 8).")
@click.option("--residual-bits", type=int, help="Bits of tensors that only feed sums (default 8).")
@click.option("--ranges", metavar="RULE", help="auto, minmax, averaged, percentile, entropy, mse or mae.")
@click.option("--attention", metavar="BITS", help="Bits of what attention multiplies: float (default), auto (the "
              "activation bits up to 6), or 2 to 8.")  # fmt: skip
@click.option("--softmax", metavar="GRID", help="Of its probabilities: auto, uniform, log-sqrt2 or log2.")
@click.option("--per-tensor", is_flag=True, help="One weight scale per tensor instead of one per output channel.")
@click.option("--weight-only", is_flag=True, help="Weights of MatMuls in blocks of 4 or 8 bits, all else in float: for "
              "text generation, one token at a time.")  # fmt: skip
@click.option("--portable", is_flag=True, help="7-bit weights where x86 processors without VNNI would saturate.")
@click.option("--keep-float", multiple=True, metavar="GLOB", help="Nodes that must stay in float; repeatable.")
@click.option("--max-size", metavar="SIZE", help="Budget of the file: 0.15x of the float file, or 2MB. Decides the "
              "bits of each layer, as the next ones do.")  # fmt: skip
@click.option("--avg-bits", metavar="BITS", help="Budget of bits per weight, on average.")
@click.option("--max-latency", metavar="TIME", help="Budget of a run's time: 0.6x of the float model's, or 1.5ms.")
@click.option("--max-bops", metavar="SHARE", help="Budget of bit operations: 0.3x of the 8-bit network's.")
@click.option("--max-cost", metavar="TABLE=LIMIT", help="Budget by a vendor's table of costs: table.csv=1200.")
@click.option("--max-drop", metavar="SHARE", help="Most of the metric that may be lost (0.005: half a point), of "
              "--eval or of the agreement; what costs more stays in float.")  # fmt: skip
@click.option(
    "--keep", is_flag=True, help="Write the nearest where a budget cannot be met; the exit code is 5 all the same."
)
@click.option("--reconstruction", metavar="METHOD", help="Learn weights block by block: adaquant, adaround, repapq, "
              "aquant or none.")  # fmt: skip
@click.option("--unit", metavar="NAME", help="What is learned at a time: block (default), layer, or parallel: all "
              "layers at once over processes.")  # fmt: skip
@click.option("--iterations", type=int, help="Steps of learning per block (default 300).")
@click.option("--bias-tuning/--no-bias-tuning", default=None, help="Learn all biases from the float model's outputs.")
@click.option(
    "--no-bn-tuning", is_flag=True, help="Leave mean and spread of the layers' results as rounding makes them."
)
@click.option("--migrate-norms/--no-migrate-norms", default=None, help="Move channel scales from normalisations, and "
              "those of loud channels, into the layers behind.")  # fmt: skip
@click.option(
    "--without", multiple=True, metavar="REWRITE", help="Leave a rewrite out (FuseBranches, ...); repeatable."
)
@click.option("--no-packing", is_flag=True, help="Store weights of 6 bits and less in whole bytes.")
@click.option("--samples", type=int, help="Most calibration rows (default 512).")
@click.option("--batch", type=int, help="Rows per run during calibration.")
@click.option(
    "--device", default="auto", metavar="NAME", help="Where learning computes: auto (default), cpu, cuda, cuda:1."
)
@click.option("--workers", type=click.IntRange(0), default=0, help="Processes of --unit parallel and of budgets "
              "(default: one per processor).")  # fmt: skip
@backend_option
@click.option("--resume", type=click.Path(path_type=Path), metavar="DIR", help="Go on with an interrupted run "
              "(default: OUTPUT.partial, if it is this run's).")  # fmt: skip
@click.option("--seed", type=int, help="Of everything random (default 0).")
@image_options
@click.option("--eval", "labelled", metavar="LABELLED", help="Labelled rows: reports top-1 before and after.")
@click.option("--report", type=click.Path(path_type=Path), metavar="FILE", help="Write an HTML report.")
@click.option("--save-plan", type=click.Path(path_type=Path), help="Write the plan (grids, placement) as JSON.")
@click.option("--save-recipe", is_flag=True, help="Write the resolved recipe to OUTPUT.toml.")
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@click.option("--no-timing", is_flag=True, help="Do not measure latency.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("-v", "--verbose", is_flag=True, help="Measure every layer, and show its bits and errors.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def quantize(model: Path, data: str, output: Path | None, labelled: str | None, **options: Any) -> None:
    """Quantize the float model MODEL to int8 and verify the result.

    The result is a standard ONNX file with the same inputs and outputs: it replaces the float file in any code
    that uses onnxruntime.
    """
    from onnxq import graph
    from onnxq.errors import TargetNotMet
    from onnxq.pipeline import forget_progress
    from onnxq.report import html_report, print_layers, print_quantize, quantize_document, to_json

    began = time.monotonic()
    graph.require_readable(model)
    target = output or model.with_name(f"{model.stem}.int8.onnx")
    if not options["dry_run"]:
        require_writable(target, model)
        if options["save_plan"] is not None:
            require_writable(options["save_plan"], model)
    if options["report"] is not None:
        require_writable(options["report"], model)
    progress = options["resume"] or target.with_name(f"{target.name}.partial")
    with terminal_log(options["quiet"] or options["as_json"]) as log, _saying_where(progress):
        result = _quantize(model, data, progress, {**options, "labelled": labelled}, log)
        if result.missed and not options["keep"]:
            raise TargetNotMet(result.missed)
        if not options["dry_run"]:
            result.save(target)
            if result.progress is not None:
                forget_progress(result.progress)
            _write_extras(result, target, options)
        summary = _summary(result, model, None if options["dry_run"] else target, labelled, options, began)
    if options["report"] is not None and result.details is not None:
        command = shlex.join(["onnxq", *sys.argv[1:]])
        write_atomically(options["report"], html_report(summary, result.details, command=command))
    if options["as_json"]:
        click.echo(to_json(quantize_document(summary)))
    else:
        if options["verbose"] and result.details is not None:
            print_layers(stdout_console(), result.details)
            click.echo()
        print_quantize(stdout_console(), summary)
        if summary.output is not None:
            click.echo(f"\nwrote {target} in {summary.seconds:.1f} s")
    if result.missed:
        raise TargetNotMet(result.missed)


@contextmanager
def _saying_where(progress: Path) -> Iterator[None]:
    """Tell an interrupted user that nothing learned is lost; states of other runs are not spoken of."""
    state = progress / "state.json"
    before = state.stat().st_mtime_ns if state.exists() else None
    try:
        yield
    except BaseException:
        if state.exists() and state.stat().st_mtime_ns != before:
            click.echo(f"what was learned is kept in {progress}; the same command goes on from there.", err=True)
        raise


def _quantize(model: Path, data: str, progress: Path, options: dict[str, Any], log: Log) -> QuantizedModel:
    from onnxq.errors import UsageError
    from onnxq.pipeline import Checks, Workplace
    from onnxq.pipeline import quantize as run

    if options["preset"] is not None and options["recipe"] is not None:
        raise UsageError("give --preset or --recipe, not both; a recipe file may name its preset.")
    if options["recipe"] is not None and options["recipe"].suffix not in (".toml", ".onnx"):
        raise UsageError(f"--recipe takes a .toml file, or an .onnx file of an earlier run, not {options['recipe']}.")
    fields = (
        "target", "weight_bits", "codebook_bits", "activation_bits", "first_last", "residual_bits", "ranges", "samples",
        "seed", "reconstruction", "unit", "iterations", "bias_tuning", "migrate_norms", "max_size", "avg_bits",
        "max_latency", "max_drop", "max_bops", "max_cost", "attention", "softmax", "placement", "threads",
    )  # fmt: skip
    changes = {name: options[name] for name in fields}
    result = run(
        model,
        data,
        options["recipe"] or options["preset"],
        preprocess=_preprocess(options),
        batch=options["batch"],
        checks=Checks(
            not options["dry_run"], not options["no_timing"], _explained(options), options["save_plan"] is not None
        ),
        place=Workplace(
            options["device"], options["workers"], progress, options["resume"] is not None, options["backend"]
        ),
        labelled=options["labelled"] if options["max_drop"] is not None else None,
        keep=options["keep"],
        log=log,
        **changes,
        per_channel=False if options["per_tensor"] else None,
        portable=True if options["portable"] else None,
        weight_only=True if options["weight_only"] else None,
        keep_float=options["keep_float"] or None,
        bn_tuning=False if options["no_bn_tuning"] else None,
        packed=False if options["no_packing"] else None,
        without=options["without"] or None,
    )
    _tell(result.data.get("notes"), log)
    return result


def _explained(options: dict[str, Any]) -> bool:
    """Whether every layer has to be measured."""
    return options["report"] is not None or (options["verbose"] and not options["as_json"])


def _preprocess(options: dict[str, Any]) -> Any:
    names = ("named", "mean", "std", "resize", "scale", "channels", "layout")
    return preprocess_of(*(options[name] for name in names))


def _tell(notes: object, log: Log) -> None:
    """Say what reading the data brought up."""
    for key, text in (notes if isinstance(notes, dict) else {}).items():
        if key == "normalisation":
            log.warn(f"normalisation: {text}. If the model wants another, give --preprocess or --mean and --std")
        else:
            log.note(f"data: {key}: {text}")


def _write_extras(result: QuantizedModel, target: Path, options: dict[str, Any]) -> None:
    if options["save_plan"] is not None:
        result.save_plan(options["save_plan"])
    if options["save_recipe"]:
        from onnxq.recipe import recipe_toml

        target.with_name(f"{target.name}.toml").write_text(recipe_toml(result.recipe), encoding="utf-8")


def _summary(
    result: QuantizedModel,
    model: Path,
    target: Path | None,
    labelled: str | None,
    options: dict[str, Any],
    began: float,
) -> Summary:
    from onnxq.pipeline import evaluate

    evaluation = None
    if labelled is not None and target is not None:
        evaluation = evaluate(
            target, labelled, reference=model, preprocess=_preprocess(options), batch=options["batch"]
        )
    return result.summary(target, evaluation=evaluation, seconds=time.monotonic() - began)
