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

from onnxq import bench, graph
from onnxq.calibrate.observe import count_rows
from onnxq.emit import weight_grid
from onnxq.graph import Model, Node
from onnxq.pipeline.histograms import decibels, tensor_detail, weight_detail
from onnxq.pipeline.planning import some_rows
from onnxq.pipeline.prepare import Prepared
from onnxq.plan import find_blocks
from onnxq.runtime import Session, SessionConfig
from onnxq.tune import ErrorSums
from onnxq.types import Dataset, Feeds, Log, Observations, QuantPlan, Silence, Tuned
from onnxq.types.details import Details, LayerDetail
from onnxq.types.mixed import Allocation, Study, bits_text
from onnxq.types.target import TARGETS

ROWS = 16
"""Held-out rows on which layers are compared."""
GROUP_BYTES = 64 * 2**20
"""Budget for the tensors of one network that are looked at together."""
FLOAT_BITS = 32
OWN_BITS = 8
"""To which products with weights in blocks round their input by themselves."""
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
        found |= {name: decibels(total.relative()) for name, total in sums.items()}
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
    emitted, target = graph.node_names(quantized), TARGETS[tuned.plan.target]
    for node in graph.nodes(model, *graph.LAYER_OPS):
        name, layer, plan = str(node.name), graph.layer_of(node), tuned.plan
        grid, source = plan.weights.get(name), graph.name_of(node.inputs[0])
        block = plan.blocks.get(name) if target.nbits and target.on_cpu else None
        integer = name in plan.weights or name in plan.integer or block is not None
        weight = graph.constant(node.inputs[1]) if isinstance(layer, str) else layer.weight
        input_grid = plan.tensors.get(source) if integer else None
        learned = tuned.layers.get(name) if grid is not None or block is not None else None
        yield LayerDetail(
            name=name,
            op_type=node.op_type,
            block=homes[name].name,
            stage=homes[name].stage,
            shape=() if weight is None else tuple(weight.shape),
            weight_bits=next((found.bits for found in (grid, block) if found is not None), FLOAT_BITS),
            input_bits=input_grid.bits if input_grid is not None else FLOAT_BITS if block is None else OWN_BITS,
            float_bytes=0 if weight is None else weight.nbytes,
            stored_bytes=_stored_bytes(emitted[name]) if weight is not None and name in emitted else 0,
            macs=macs.get(name, 0),
            reason="" if integer else plan.skipped.get(name) or (layer if isinstance(layer, str) else "not quantized"),
            tuned=learned is not None,
            source=source,
            result=results[name],
            sqnr_db=errors.get(name),
            weight=None if isinstance(layer, str) else weight_detail(layer, grid, learned, block),
        )


def _stored_bytes(node: Node) -> int:
    """Bytes of a weight in the file, with its steps and zero points; tables that layers share are left out."""
    restored = graph.producer(node.inputs[1], "DequantizeLinear")
    stored = node.inputs[1] if restored is None else restored.inputs[0]
    packed = graph.producer(stored) is not None
    own = [value for value in graph.sources(stored) or [] if not packed or len(graph.users(value)) == 1]
    steps = weight_grid(node) if node.op_type != "MatMulNBits" else [value for value in node.inputs[2:4] if value]
    return sum(value.const_value.nbytes for value in own + steps if value.const_value is not None)
