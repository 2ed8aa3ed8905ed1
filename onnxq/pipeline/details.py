"""What the report shows of single layers and tensors: errors, histograms, sizes.

A layer's error compares the tensor behind it, bias and activation included, in the whole float network and in the whole
quantized one: what the layers in front of it lost is part of it. The error of a weight or an activation grid alone is
told apart from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version

import numpy as np
import numpy.typing as npt

from onnxq import bench, graph
from onnxq.calibrate.observe import count_rows
from onnxq.emit import weight_codes, weight_grid
from onnxq.graph import Layer, Model, Node
from onnxq.grid import Grid, fake_quantize
from onnxq.pipeline.planning import some_rows
from onnxq.pipeline.prepare import Prepared
from onnxq.plan import find_blocks
from onnxq.runtime import Session, SessionConfig
from onnxq.tune import ErrorSums
from onnxq.types import Dataset, Feeds, LearnedLayer, Log, Observations, QuantPlan, Silence, TensorStats, Tuned
from onnxq.types.details import Bars, Details, LayerDetail, TensorDetail, WeightDetail
from onnxq.types.flow import TensorGrid
from onnxq.types.mixed import Allocation, Study, bits_text
from onnxq.types.weights import WeightGrid

ROWS = 16
"""Held-out rows on which layers are compared."""
GROUP_BYTES = 64 * 2**20
"""Budget for the tensors of one network that are looked at together."""
BINS = 64
FLOAT_BITS = 32
PLAIN = SessionConfig(stop_spinning=True)
ROUNDED = SessionConfig(stop_spinning=True, simulate=True)
RECORDED = {"onnxq.version": "onnxq", "onnxq.source": "source", "onnxq.source_sha256": "source SHA-256"}
PARTS = ("onnxruntime", "onnx", "onnx-ir", "numpy", "onnxsim", "torch")


def details(
    prepared: Prepared,
    quantized: Model,
    tuned: Tuned,
    observations: Observations,
    held_out: Dataset,
    *,
    rows: int = ROWS,
    log: Log = Silence(),
) -> Details:
    """Measure every layer of a quantized model, and gather its histograms.

    Args:
        prepared: The float side.
        quantized: What `emit` made of it.
        tuned: The plan and the learned codes behind it.
        observations: What calibration saw.
        held_out: Rows that calibration did not see.
        rows: Most rows that layers are compared on; tensors of one network take at most 64 MiB at a time, unless a
            single tensor is larger.
        log: Progress.
    """
    log.stage("Comparing layer by layer")
    model, plan = prepared.model, tuned.plan
    results = {str(node.name): _result(node) for node in graph.nodes(model, *graph.LAYER_OPS)}
    batches = some_rows(held_out, rows, model)
    errors = _errors(model, quantized, plan, results, observations, batches)
    return Details(
        layers=tuple(_layers(model, quantized, tuned, observations, results, errors)),
        tensors={
            name: tensor_detail(observations.tensors[name], grid)
            for name, grid in plan.tensors.items()
            if name in observations.tensors
        },
        rows=sum(count_rows(feeds) for feeds in batches),
        passes=prepared.passes,
        versions=_versions(quantized),
    )


def with_study(found: Details, study: Study, chosen: Allocation | None = None) -> Details:
    """The same with measured sensitivities and the front of sizes, and what was taken of it."""
    known = study.known
    errors = {
        layer: {bits_text(bits): added.output for bits, added in known.added[group].items()}
        for group, layers in known.groups.items()
        for layer in layers
    }
    front = tuple((point.costs["size"], point.degradation) for point in study.front)
    taken = None if chosen is None else (chosen.costs["size"], chosen.degradation)
    return replace(found, sensitivity=errors, front=front, chosen=taken)


def _versions(quantized: Model) -> dict[str, str]:
    """What the file records about its making, and versions of the parts."""
    found = {shown: text for key, shown in RECORDED.items() if (text := quantized.metadata_props.get(key))}
    for part in PARTS:
        try:
            found[part] = version(part)
        except PackageNotFoundError:
            continue
    return found


def _result(node: Node) -> str:
    """The tensor behind a layer's bias and activation."""
    layer = graph.layer_of(node)
    if isinstance(layer, str):
        return graph.name_of(node.outputs[0])
    activation = graph.activation_after(layer.output)
    return graph.name_of(activation.node.outputs[0] if activation is not None else layer.output)


def _errors(
    model: Model,
    quantized: Model,
    plan: QuantPlan,
    results: Mapping[str, str],
    seen: Observations,
    batches: Sequence[Feeds],
) -> dict[str, float]:
    """SQNR in decibels of every layer's result, by node name; rounded where it has a grid."""
    values = graph.value_map(quantized)
    restored = {name: f"{name}_dq" for name in plan.tensors if f"{name}_dq" in values}
    found: dict[str, float] = {}
    most = max((count_rows(feeds) for feeds in batches), default=1)
    for group in _groups(results, _sizes(model, seen, most)):
        ends = {name: (results[name], restored.get(results[name], results[name])) for name in group}
        pairs = {name: pair for name, pair in ends.items() if pair[1] in values}
        if not pairs:
            continue
        left = Session(graph.with_outputs(model, [one for one, _ in pairs.values()], keep=False), PLAIN)
        right = Session(graph.with_outputs(quantized, [other for _, other in pairs.values()], keep=False), ROUNDED)
        sums = {name: ErrorSums() for name in pairs}
        for feeds in batches:
            wanted, given = (session.run({s.name: feeds[s.name] for s in session.inputs}) for session in (left, right))
            for name, (one, other) in pairs.items():
                sums[name].add({name: wanted[one]}, {name: given[other]})
        found |= {name: _decibels(total.relative()) for name, total in sums.items()}
    return found


def _sizes(model: Model, seen: Observations, rows: int) -> dict[str, float]:
    """Bytes of each layer's result for `rows` rows, by node name."""
    found = {}
    for node in graph.nodes(model, *graph.LAYER_OPS):
        shape = seen.shapes.get(graph.name_of(node.outputs[0]), ())
        found[str(node.name)] = 4.0 * math.prod(shape) * rows / max(seen.batch_rows, 1)
    return found


def _groups(names: Mapping[str, str], sizes: Mapping[str, float]) -> Iterator[list[str]]:
    """Layers in order, as many at a time as fit the budget."""
    group: list[str] = []
    used = 0.0
    for name in names:
        if group and used + sizes[name] > GROUP_BYTES:
            yield group
            group, used = [], 0.0
        group.append(name)
        used += sizes[name]
    if group:
        yield group


def _decibels(share: float) -> float:
    """10 log10(signal / noise) from noise over signal."""
    return math.inf if share <= 0 else -10.0 * math.log10(share)


def _layers(
    model: Model,
    quantized: Model,
    tuned: Tuned,
    seen: Observations,
    results: Mapping[str, str],
    errors: Mapping[str, float],
) -> Iterator[LayerDetail]:
    shaped = model.clone()
    graph.infer_shapes(shaped)
    homes = {name: block for block in find_blocks(shaped) for name in block.nodes}
    macs = bench.float_macs(model, seen.shapes, seen.batch_rows)
    emitted = graph.node_names(quantized)
    for node in graph.nodes(model, *graph.LAYER_OPS):
        name, layer, plan = str(node.name), graph.layer_of(node), tuned.plan
        grid, source = plan.weights.get(name), graph.name_of(node.inputs[0])
        integer = name in plan.weights or name in plan.integer
        weight = graph.constant(node.inputs[1]) if isinstance(layer, str) else layer.weight
        input_grid = plan.tensors.get(source) if integer else None
        learned = tuned.layers.get(name) if grid is not None else None
        yield LayerDetail(
            name=name,
            op_type=node.op_type,
            block=homes[name].name,
            stage=homes[name].stage,
            shape=() if weight is None else tuple(weight.shape),
            weight_bits=FLOAT_BITS if grid is None else grid.bits,
            input_bits=FLOAT_BITS if input_grid is None else input_grid.bits,
            float_bytes=0 if weight is None else weight.nbytes,
            stored_bytes=_stored_bytes(emitted[name]) if weight is not None and name in emitted else 0,
            macs=macs.get(name, 0),
            reason="" if integer else plan.skipped.get(name) or (layer if isinstance(layer, str) else "not quantized"),
            tuned=learned is not None,
            source=source,
            result=results[name],
            sqnr_db=errors.get(name),
            weight=None if isinstance(layer, str) else weight_detail(layer, grid, learned),
        )


def _stored_bytes(node: Node) -> int:
    """Bytes of a weight in the file, with its steps and zero points; tables that layers share are left out."""
    restored = graph.producer(node.inputs[1], "DequantizeLinear")
    stored = node.inputs[1] if restored is None else restored.inputs[0]
    packed = graph.producer(stored) is not None
    own = [value for value in graph.sources(stored) or [] if not packed or len(graph.users(value)) == 1]
    return sum(value.const_value.nbytes for value in own + weight_grid(node) if value.const_value is not None)


def weight_detail(layer: Layer, grid: WeightGrid | None, learned: LearnedLayer | None = None) -> WeightDetail:
    """Histograms and error of a layer's weight; without `grid` it stays in float, `learned` replaces plain rounding."""
    weight = layer.weight
    bounds = np.abs(np.moveaxis(weight, layer.axis, 0).reshape(layer.channels, -1)).max(axis=1)
    middle, widest = float(np.median(bounds)), int(bounds.argmax())
    spread = float(bounds[widest]) / middle if middle else (math.inf if bounds[widest] else 1.0)
    if grid is None:
        return WeightDetail(_bars(weight, float(weight.min()), float(weight.max())), None, None, None, widest, spread)
    steps = np.asarray(grid.scales, np.float32)
    low, high = float((steps * grid.ends()[0]).min()), float((steps * grid.ends()[1]).max())
    codes = weight_codes(layer, grid) if learned is None else learned.codes
    noise = np.square(grid.along(steps, codes.ndim) * codes - weight, dtype=np.float64).sum()
    power = float(np.square(weight, dtype=np.float64).sum())
    return WeightDetail(
        values=_bars(weight, min(float(weight.min()), low), max(float(weight.max()), high)),
        codes=_code_bars(codes - grid.along(grid.middles(), codes.ndim), 8 if grid.values else grid.bits),
        clip=(low, high),
        sqnr_db=_decibels(float(noise) / power) if power else None,
        widest=widest,
        spread=spread,
    )


def _bars(values: npt.NDArray[np.float32], low: float, high: float) -> Bars:
    """`values` in bins over [low, high]; a single bin where that is a point."""
    if low >= high:
        return Bars((float(values.size),), low, high)
    counts, _ = np.histogram(values, BINS, (low, high))
    return Bars(tuple(counts.astype(float).tolist()), low, high)


def _code_bars(codes: npt.NDArray[np.int8], bits: int) -> Bars:
    """One bin per code, or per four codes and so on where there are more than 64."""
    count = 1 << bits
    width = max(count // BINS, 1)
    counts = np.bincount((codes.reshape(-1).astype(np.int64) + count // 2) // width, minlength=count // width)
    return Bars(tuple(counts.astype(float).tolist()), -count / 2 - 0.5, count / 2 - 0.5)


def tensor_detail(stats: TensorStats, grid: TensorGrid) -> TensorDetail:
    """The histogram of an activation, thinned to 64 bins, and what its grid does to it."""
    codes = Grid(grid.bits, grid.signed, symmetric=False)
    clip = ((codes.qmin - grid.zero_point) * grid.scale, (codes.qmax - grid.zero_point) * grid.scale)
    used = np.flatnonzero(stats.counts) if stats.limit else np.zeros(0, np.int64)
    values, counts = stats.limit * ((2.0 * used + 1.0) / len(stats.counts) - 1.0), stats.counts[used]
    rounded = fake_quantize(values, grid.scale, grid.zero_point, codes)
    power = float(counts @ np.square(values))
    beyond = (values < clip[0] - grid.scale / 2) | (values > clip[1] + grid.scale / 2)
    return TensorDetail(
        values=_thinned(stats, min(stats.low, clip[0]), max(stats.high, clip[1])),
        low=stats.low,
        high=stats.high,
        clip=clip,
        scale=grid.scale,
        zero_point=grid.zero_point,
        bits=grid.bits,
        rule=grid.rule,
        clipped=float(counts[beyond].sum() / counts.sum()) if len(counts) else 0.0,
        sqnr_db=_decibels(float(counts @ np.square(values - rounded)) / power) if power else None,
    )


def _thinned(stats: TensorStats, low: float, high: float) -> Bars:
    """The histogram over [low, high], which holds all values; counts of cut bins are shared out."""
    if not stats.limit or low >= high:
        return Bars((float(stats.counts.sum()),), low, high)
    ends = np.linspace(-stats.limit, stats.limit, len(stats.counts) + 1)
    below = np.concatenate([[0.0], np.cumsum(stats.counts)])
    reached = np.interp(np.linspace(low, high, BINS + 1), ends, below)
    reached[0], reached[-1] = 0.0, below[-1]
    counts = np.diff(reached)
    return Bars(tuple(counts.tolist()), low, high)
