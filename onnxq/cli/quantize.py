"""`onnxq quantize`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxq.cli.common import image_options, preprocess_of, require_writable, stdout_console, terminal_log

if TYPE_CHECKING:
    from onnxq.pipeline import QuantizedModel
    from onnxq.types import Log, Summary

EPILOG = """\b
Examples:
  onnxq quantize resnet.onnx --data photos/ --preprocess imagenet
  onnxq quantize bert.onnx --data calibration/*.npz's folder -o bert.int8.onnx
  onnxq quantize model.onnx --data reader:batches --preset fast --dry-run
"""


@click.command(epilog=EPILOG)
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--data", required=True, metavar="DATA", help="Calibration rows: a folder of images, .npz or .npy; one "
              ".npz or .npy; or module:callable.")  # fmt: skip
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Result; default: MODEL.int8.onnx beside it.")
@click.option("--preset", metavar="NAME", help="fast: min-max ranges. balanced (default): ranges by output error, "
              "layers' means and spreads tuned.")  # fmt: skip
@click.option("--recipe", type=click.Path(path_type=Path), help="TOML file; options given here replace its values.")
@click.option("--target", metavar="NAME", help="auto (this machine, default) or cpu.")
@click.option("--weight-bits", type=int, help="2 to 8 (default 8); below 8 only the file shrinks.")
@click.option("--activation-bits", type=int, help="2 to 8 (default 8); below 8 is simulated.")
@click.option("--first-last", type=int, help="Bits of the first and last layer (default 8).")
@click.option("--residual-bits", type=int, help="Bits of tensors that only feed sums (default 8).")
@click.option("--ranges", metavar="RULE", help="auto, minmax, averaged, percentile, entropy, mse or mae.")
@click.option("--per-tensor", is_flag=True, help="One weight scale per tensor instead of one per output channel.")
@click.option("--portable", is_flag=True, help="7-bit weights where x86 processors without VNNI would saturate.")
@click.option("--keep-float", multiple=True, metavar="GLOB", help="Nodes that must stay in float; repeatable.")
@click.option(
    "--no-bn-tuning", is_flag=True, help="Leave mean and spread of the layers' results as rounding makes them."
)
@click.option("--migrate-norms", is_flag=True, help="Move channel scales from normalisations into the layers behind.")
@click.option(
    "--without", multiple=True, metavar="REWRITE", help="Leave a rewrite out (FuseBranches, ...); repeatable."
)
@click.option("--samples", type=int, help="Most calibration rows (default 512).")
@click.option("--batch", type=int, help="Rows per run during calibration.")
@click.option("--seed", type=int, help="Of everything random (default 0).")
@image_options
@click.option("--eval", "labelled", metavar="LABELLED", help="Labelled rows: reports top-1 before and after.")
@click.option("--save-plan", type=click.Path(path_type=Path), help="Write the plan (grids, placement) as JSON.")
@click.option("--save-recipe", is_flag=True, help="Write the resolved recipe to OUTPUT.toml.")
@click.option("--dry-run", is_flag=True, help="Show the plan; write nothing.")
@click.option("--no-timing", is_flag=True, help="Do not measure latency.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of tables.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def quantize(model: Path, data: str, output: Path | None, labelled: str | None, **options: Any) -> None:
    """Quantize the float model MODEL to int8 and verify the result.

    The result is a standard ONNX file with the same inputs and outputs: it replaces the float file in any code
    that uses onnxruntime.
    """
    from onnxq import graph
    from onnxq.report import print_quantize, quantize_document, to_json

    began = time.monotonic()
    graph.require_readable(model)
    target = output or model.with_name(f"{model.stem}.int8.onnx")
    if not options["dry_run"]:
        require_writable(target, model)
        if options["save_plan"] is not None:
            require_writable(options["save_plan"], model)
    with terminal_log(options["quiet"] or options["as_json"]) as log:
        result = _quantize(model, data, options, log)
        if not options["dry_run"]:
            result.save(target)
            _write_extras(result, target, options)
        summary = _summary(result, model, None if options["dry_run"] else target, labelled, options, began)
    if options["as_json"]:
        click.echo(to_json(quantize_document(summary)))
        return
    print_quantize(stdout_console(), summary)
    if summary.output is not None:
        click.echo(f"\nwrote {target} in {summary.seconds:.1f} s")


def _quantize(model: Path, data: str, options: dict[str, Any], log: Log) -> QuantizedModel:
    from onnxq.errors import UsageError
    from onnxq.pipeline import quantize as run

    if options["preset"] is not None and options["recipe"] is not None:
        raise UsageError("give --preset or --recipe, not both; a recipe file may name its preset.")
    if options["recipe"] is not None and options["recipe"].suffix != ".toml":
        raise UsageError(f"--recipe takes a .toml file, not {options['recipe']}.")
    fields = (
        "target", "weight_bits", "activation_bits", "first_last", "residual_bits", "ranges", "samples", "seed",
    )  # fmt: skip
    changes = {name: options[name] for name in fields}
    result = run(
        model,
        data,
        options["recipe"] or options["preset"],
        preprocess=_preprocess(options),
        batch=options["batch"],
        check=not options["dry_run"],
        time_it=not options["no_timing"],
        log=log,
        **changes,
        per_channel=False if options["per_tensor"] else None,
        portable=True if options["portable"] else None,
        keep_float=options["keep_float"] or None,
        bn_tuning=False if options["no_bn_tuning"] else None,
        migrate_norms=True if options["migrate_norms"] else None,
        without=options["without"] or None,
    )
    _tell(result.data.get("notes"), log)
    return result


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
    from dataclasses import asdict

    from onnxq.pipeline import evaluate
    from onnxq.types import Summary

    evaluation = None
    if labelled is not None and target is not None:
        evaluation = evaluate(
            target, labelled, reference=model, preprocess=_preprocess(options), batch=options["batch"]
        )
    return Summary(
        source=str(model),
        output=None if target is None else str(target),
        recipe=asdict(result.recipe),
        data=result.data,
        rows=result.rows,
        plan=result.plan,
        verdict=result.verdict,
        evaluation=evaluation,
        seconds=time.monotonic() - began,
    )
