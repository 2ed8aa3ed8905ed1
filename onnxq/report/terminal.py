"""Results as terminal tables."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from onnxq.report import words
from onnxq.types import (
    BlockInfo,
    BlockResult,
    Coverage,
    Evaluation,
    Inspection,
    Interval,
    QuantPlan,
    Summary,
    Verdict,
)
from onnxq.types.outliers import Outlier, TensorOutliers

SHOWN = 6
"""Most rows of a list; the rest is in the JSON."""
UNREMARKABLE = (
    "it works on shapes or masks",
    "its operands are float at no extra cost",
    "an operand is float",
    "nothing behind it reads integers",
)
"""Reasons that follow from other nodes', or concern nodes without work to speak of."""


def print_quantize(console: Console, run: Summary) -> None:
    """The table at the end of `quantize`, and what stayed float and why."""
    if run.verdict is None:
        _print_plan(console, run)
        return
    console.print(_verdict_table(run, run.verdict))
    _print_floats(console, run.verdict.coverage, run.plan)
    for note in run.verdict.notes:
        console.print(f"note: {escape(note)}")
    for warning in run.verdict.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}")


def _verdict_table(run: Summary, verdict: Verdict) -> Table:
    table = Table(show_header=True, header_style="bold", box=None, pad_edge=False)
    for heading, justify in (("", "left"), ("float", "right"), ("quantized", "right"), ("", "left")):
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    shrink = verdict.float_bytes / max(verdict.quantized_bytes, 1)
    table.add_row("size", _bytes(verdict.float_bytes), _bytes(verdict.quantized_bytes), f"{shrink:.2f}x smaller")
    if len(verdict.latency) > 1:
        plain, quick = verdict.latency
        threads = f"latency, {quick.threads} thread{'s' if quick.threads != 1 else ''}"
        table.add_row(threads, f"{plain.median_ms:.3f} ms", f"{quick.median_ms:.3f} ms", quick.words)
    if verdict.placed is not None:
        table.add_row("measured placement", "", "", verdict.placed.words)
    if verdict.formed is not None:
        table.add_row("measured products", "", "", verdict.formed.words)
    if run.evaluation is not None and run.evaluation.accuracy is not None:
        base = run.evaluation.reference_accuracy
        table.add_row(
            "top-1",
            _percent(base) if base is not None else "-",
            _percent(run.evaluation.accuracy),
            _paired(run.evaluation, f"95 % CI of {run.evaluation.rows} labelled rows"),
        )
    if verdict.fidelity.agreement is not None:
        agreement = verdict.fidelity.agreement
        table.add_row("agreement", "", _percent(agreement), f"95 % CI of {verdict.fidelity.rows} held-out rows")
    for name, sqnr in verdict.fidelity.sqnr_db.items():
        table.add_row("SQNR", "", f"{sqnr:.1f} dB", f"output {escape(name)}")
    for name in verdict.fidelity.uneven:
        table.add_row("SQNR", "", "-", f"output {escape(name)} has another shape: what is found differs")
    if run.blocks:
        table.add_row("blocks learned", "", f"{sum(block.kept for block in run.blocks)}", _gain(run.blocks))
    coverage = verdict.coverage
    planned = ", planned" if coverage.planned else ""
    table.add_row(f"integer coverage{planned}", "", f"{100 * coverage.share:.1f} %", _macs(coverage))
    return table


def _paired(found: Evaluation, rows: str) -> str:
    return rows if found.paired is None else f"{rows}; {found.paired.brief}"


def _gain(blocks: Sequence[BlockResult]) -> str:
    """What learning did to the error at the blocks' outputs."""
    before, after = (
        statistics.fmean(getattr(block, "after" if learned and block.kept else "before") for block in blocks)
        for learned in (False, True)
    )
    return f"of {len(blocks)}; mean error of a block's outputs {100 * before:.2g} -> {100 * after:.2g} % of the signal"


def _macs(coverage: Coverage) -> str:
    if coverage.planned:
        return f"of {coverage.total_macs / 1e6:.2f} M multiply-accumulates"
    integer = ("QLinear", "QGemm", "MatMulInteger", "DynamicQuantizeMatMul", "ConvInteger", "MatMulNBits")
    kernels = sum(count for name, count in coverage.kernels.items() if name.startswith(integer))
    return f"of {coverage.total_macs / 1e6:.2f} M multiply-accumulates, in {kernels} integer kernels"


def _print_floats(console: Console, coverage: Coverage, plan: QuantPlan) -> None:
    """What stayed float: matrix nodes first, which count in the coverage, then the others by reason."""
    heavy = {node.name: node.reason or plan.skipped.get(node.name, "") for node in coverage.floats}
    others = {name: why for name, why in plan.skipped.items() if name not in heavy and why not in UNREMARKABLE}
    groups: dict[str, list[str]] = {}
    for name, reason in (heavy | others).items():
        groups.setdefault(reason, []).append(name)
    if not groups:
        return
    console.print("\n[bold]stayed float[/]")
    for reason, names in list(groups.items())[:SHOWN]:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        console.print(f"  {escape(names[0])}{more}: {escape(reason)}")
    if len(groups) > SHOWN:
        console.print(f"  ... and {len(groups) - SHOWN} more reasons (--json lists all)")


def _print_plan(console: Console, run: Summary) -> None:
    table = Table(
        header_style="bold",
        box=None,
        pad_edge=False,
        title="plan (nothing was written)",
        title_justify="left",
    )
    for heading in ("layer", "weights", "scales"):
        table.add_column(heading)
    for name, grid in run.plan.weights.items():
        weights = f"codebook of {grid.bits} bits" if grid.values else f"int{grid.bits}"
        table.add_row(escape(name), weights, "per channel" if grid.axis is not None else "per tensor")
    for name, block in run.plan.blocks.items():
        table.add_row(escape(name), f"int{block.bits}", f"blocks of {block.block}")
    console.print(table)
    stored = f", {len(run.plan.blocks)} with weights in blocks" if run.plan.blocks else ""
    console.print(f"{len(run.plan.integer)} nodes in integers, {len(run.plan.tensors)} quantized tensors{stored}")
    for reason, count in Counter(run.plan.skipped.values()).most_common(SHOWN):
        console.print(f"  {count} nodes stay float: {escape(reason)}")


def print_evaluation(console: Console, model: str, found: Evaluation) -> None:
    """One line per figure."""
    if found.accuracy is not None:
        console.print(f"top-1      {_percent(found.accuracy)}   (95 % CI of {found.rows} rows, {escape(model)})")
    if found.reference_accuracy is not None:
        console.print(f"reference  {_percent(found.reference_accuracy)}")
    if found.paired is not None:
        console.print(f"difference {found.paired.words}")
    if found.fidelity is not None:
        if found.fidelity.agreement is not None:
            console.print(f"agreement  {_percent(found.fidelity.agreement)}   (95 % CI of {found.fidelity.rows} rows)")
        for name, sqnr in found.fidelity.sqnr_db.items():
            console.print(f"SQNR       {sqnr:.2f} dB   (output {escape(name)})")
        for name in found.fidelity.uneven:
            console.print(f"SQNR       -   (output {escape(name)} has another shape: what is found differs)")


def print_inspection(console: Console, found: Inspection) -> None:
    """What is in a file."""
    console.print(f"[bold]{escape(found.path)}[/]  {_bytes(found.bytes)}, opset {found.opset}, IR {found.ir_version}")
    for spec in found.inputs:
        console.print(f"  input   {escape(str(spec))}")
    for name in found.outputs:
        console.print(f"  output  {escape(name)}")
    weights = ", ".join(f"{dtype} {_bytes(size)}" for dtype, size in found.weight_bytes.items())
    console.print(f"  weights {weights or 'none'}")
    operators = ", ".join(f"{count} {name}" for name, count in list(found.operators.items())[:12])
    console.print(f"  nodes   {operators}")
    if found.coverage is not None:
        console.print(f"  integer coverage {100 * found.coverage.share:.1f} % {_macs(found.coverage)}")
    for key, text in found.provenance.items():
        console.print(f"  {key.removeprefix('onnxq.')}: {escape(text)}", soft_wrap=True)
    if found.layers:
        console.print(_layer_table(found))
        console.print(
            f"{len(found.layers)} layers: {found.layer_weights} weights of {found.average_bits:.2f} bits, "
            f"{_bytes(found.layer_bytes)} with scales"
        )
    if found.blocks is not None:
        console.print()
        console.print(_block_table(found.blocks) if found.blocks else "no blocks: they are found in float models")
    if found.outliers is not None:
        console.print()
        _print_outliers(console, found.outliers)


def _print_outliers(console: Console, found: Mapping[str, TensorOutliers]) -> None:
    """Channels and samples that stand out; samples are counted from 0."""
    loud = {name: tensor for name, tensor in found.items() if tensor.channels or tensor.samples}
    if not loud:
        console.print(f"no channel and no sample stands out in the {len(found)} tensors that layers read")
        return
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in ("outliers in", "channels (times the median)", "samples, from 0 (times the median)"):
        table.add_column(heading)
    for name, tensor in loud.items():
        table.add_row(escape(name), _extremes(tensor.channels), _extremes(tensor.samples))
    console.print(table)
    samples = Counter(one.index for tensor in loud.values() for one in tensor.samples)
    if samples:
        worst = ", ".join(f"{index} (in {count})" for index, count in samples.most_common(SHOWN))
        console.print(f"samples that stand out in most tensors: {worst}")


def _extremes(found: Sequence[Outlier]) -> str:
    shown = ", ".join(f"{one.index} ({one.times:.3g}x)" for one in found[:SHOWN]) or "-"
    return shown + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")


def _layer_table(found: Inspection) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    weight = ("weight", "bits", "codes", "bytes", "stored")
    for heading in ("layer", "op", *weight, "input", "scale", "zero point", "output"):
        table.add_column(heading, justify="right" if heading in ("bits", "bytes") else "left")
    for layer in found.layers:
        stored = layer.weight_dtype + (f" book of {layer.codebook}" if layer.codebook else "")
        stored += f" x {layer.weight_scales} scales" if layer.weight_scales else ""
        table.add_row(
            escape(layer.name),
            layer.op_type,
            "x".join(map(str, layer.weight_shape)),
            str(layer.weight_bits),
            "-" if layer.codes is None else f"{min(layer.codes)} .. {max(layer.codes)}",
            str(layer.weight_bytes),
            f"packed {stored}" if layer.packed else stored,
            layer.input_dtype,
            "-" if layer.input_scale is None else f"{layer.input_scale:.4g}",
            "-" if layer.input_zero_point is None else str(layer.input_zero_point),
            layer.output_dtype,
        )
    return table


def _block_table(blocks: Sequence[BlockInfo]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for heading in ("stage", "block", "layers", "nodes", "reads", "hands on"):
        table.add_column(heading, justify="right" if heading in ("stage", "layers", "nodes") else "left")
    for block in blocks:
        table.add_row(
            str(block.stage),
            escape(block.name),
            str(len(block.layers)),
            str(block.nodes),
            escape(", ".join(block.inputs)),
            escape(", ".join(block.outputs)),
        )
    return table


def _bytes(count: int) -> str:
    size = float(count)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def _percent(interval: Interval) -> str:
    """With its 95 % interval."""
    return f"{words.percent(interval.value, 2)} ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
