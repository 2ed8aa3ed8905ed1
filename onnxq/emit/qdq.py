"""QuantizeLinear / DequantizeLinear in exactly the patterns that a target's kernels absorb; here, onnxruntime's on CPU.

    x -> Q -> DQ -+                                     one pair per quantized tensor, directly behind its producer
    w_q ----> DQ -+-> Conv|Gemm|MatMul -> [Relu|Clip] -> Q -> DQ -> ...
    b_q ----> DQ -+                                     int32, scale = x scale * weight scale, zero point 0

Weights are int8 initializers called `<node>.weight_q`, or bytes that nodes unpack into that (`packing`); biases are
int32 ones called `<node>.bias_q`. Weight axes follow the operator: Conv 0, Gemm 1 (transB=1: 0), MatMul 1; the runtime
fuses a wrong axis without a word, so emission checks the length of the scales against the weight. Other targets leave
biases in float, or want a pair for every reader (`types.target`); what computes in float16 is in `half`; operators of
the runtime's own are in `products` and `silu`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.emit.blocks import emit_blocks
from onnxq.emit.books import book_of
from onnxq.emit.compact import compact
from onnxq.emit.half import to_half
from onnxq.emit.log_softmax import emit_log_softmax
from onnxq.emit.packing import Packer
from onnxq.emit.pairs import as_sum, codes_of, emit_constant, emit_pair, guard
from onnxq.emit.products import has_float_result, round_dynamically, write_product
from onnxq.emit.silu import write_silu
from onnxq.emit.stored import dequantized, emit_bias, float_bias, int32_steps, steps_of
from onnxq.emit.tables import store_table
from onnxq.errors import UnsupportedError
from onnxq.graph import Layer, Model, Node, Value
from onnxq.types import LearnedLayer, QuantPlan, TensorGrid, WeightGrid
from onnxq.types.target import TARGETS, Target

LARGEST_PRODUCT = 1e38
"""Of a step of weights and that of their input: the scale of the bias, a float32."""


def emit(
    model: Model,
    plan: QuantPlan,
    metadata: Mapping[str, str] | None = None,
    learned: Mapping[str, LearnedLayer] | None = None,
    *,
    packed: bool = False,
    fused: bool = False,
) -> Model:
    """The quantized model of `plan`.

    Args:
        model: The prepared float model the plan was made for; left as it is.
        plan: Grids and placement.
        metadata: Provenance for the file's `metadata_props`.
        learned: Codes and biases that replace plain rounding, by node name; entries of nodes whose weights the plan
            neither quantizes nor stores in blocks are not looked at.
        packed: Store weight codes of up to 6 bits packed, and give all that is added short names: a smaller file of the
            same outputs and kernels that takes a little longer to load.
        fused: Write operators of the runtime's own where they are faster than what it makes of pairs and the target
            has them: the file to be used; learning needs the pairs.

    Raises:
        UnsupportedError: The plan names tensors or nodes that the model does not have, or what was learned does not
            fit: codes of another shape, or a bias for a MatMul without an Add behind it.
    """
    quantized = model.clone()
    nodes = graph.node_names(quantized)
    target = _require(plan, nodes, graph.value_map(quantized))
    fused, inside = fused and target.fused, _inside(nodes, plan, target)
    written = _products(nodes, plan) if fused else {}
    constants = _emit_layers(quantized, plan, learned or {}, target, packed, written)
    _emit_norm_biases(quantized, plan, inside)
    values = graph.value_map(quantized)
    for name, grid in constants.items():
        emit_constant(quantized, values[name], grid, inside)
    for name, grid in plan.tensors.items():
        border = plan.borders.get(name)
        emit_pair(quantized, values[name], grid, inside, name in plan.guards, border, own=target.own_pairs)
    for name, log_grid in plan.log_softmax.items():
        emit_log_softmax(quantized, nodes[name], log_grid, inside)
    for name in plan.guards:
        if name not in plan.tensors:
            guard(quantized, values[name])
    for name in plan.sums:
        as_sum(quantized, nodes[name])
    for name in plan.tables:
        store_table(quantized, nodes[name])
    for name, block in plan.blocks.items():
        found = (learned or {}).get(name)
        emit_blocks(quantized, nodes[name], block, target, None if found is None else found.codes)
    for name, layer in written.items():
        write_product(quantized, layer, (learned or {}).get(name))
    for name in plan.dynamic if fused else ():
        round_dynamically(quantized, values[name])
    for name in plan.integer if fused else ():
        write_silu(quantized, nodes[name])
    if plan.half:
        to_half(quantized, plan.half)
    return _finished(quantized, model, metadata, packed)


def _inside(nodes: Mapping[str, Node], plan: QuantPlan, target: Target) -> set[Node]:
    """The nodes that read from grids."""
    heads = {nodes[name] for name in plan.integer}
    gates = (graph.silu_gate(node) for node in heads) if target.fused else ()
    return heads | {gate for gate in gates if gate is not None}


def _finished(quantized: Model, model: Model, metadata: Mapping[str, str] | None, packed: bool) -> Model:
    """What was made of `model`, without what nothing reads, and signed."""
    graph.remove_unused(quantized)
    graph.forget_shapes(quantized)
    if packed:
        compact(quantized, model)
    quantized.ir_version = graph.lowest_ir_version(quantized)
    quantized.producer_name = "onnxq"
    quantized.metadata_props.update(metadata or {})
    return quantized


def _packer(model: Model, plan: QuantPlan, codes: Mapping[str, npt.NDArray[np.int8]]) -> Packer:
    grids = {f"{name}.weight_q": plan.weights[name] for name in codes}
    stored = {f"{name}.weight_q": array for name, array in codes.items()}
    books = {name: book for name, grid in grids.items() if (book := book_of(stored[name], grid)) is not None}
    moved = [name for name in grids if name not in books]
    middles = {name: grids[name].along(grids[name].middles(), stored[name].ndim) for name in moved}
    return Packer(model, stored, middles, books)


def _products(nodes: Mapping[str, Node], plan: QuantPlan) -> dict[str, Layer]:
    """The layers that become the runtime's own operator."""
    layers = {name: _layer(nodes[name]) for name in plan.weights}
    return {name: layer for name, layer in layers.items() if has_float_result(layer, plan)}


def _emit_layers(
    model: Model,
    plan: QuantPlan,
    learned: Mapping[str, LearnedLayer],
    target: Target,
    packed: bool,
    products: Collection[str],
) -> dict[str, TensorGrid]:
    """Weights, and biases but those of `products`; returns the grids of constant operands, learned biases included."""
    nodes = graph.node_names(model)
    layers = {name: _layer(nodes[name]) for name in plan.weights}
    codes = {name: _codes(layer, plan.weights[name], learned.get(name)) for name, layer in layers.items()}
    packer = _packer(model, plan, codes) if packed else None
    constants = dict(plan.constants)
    for name, layer in layers.items():
        weights, input_scale = plan.weights[name], _input_grid(plan, layer).scale
        _emit_weight(model, layer, weights, codes[name], packer)
        if name in products:
            continue
        alone = layer.bias_add is not None and layer.bias_add.name in plan.integer
        if not target.float_bias and not alone:
            emit_bias(model, layer, weights, input_scale, learned.get(name))
            continue
        made = float_bias(model, layer, learned.get(name))
        if made is not None and alone:
            constants[graph.name_of(made)] = _grid_of(made, next(iter(plan.constants.values())))
    return constants


def _grid_of(value: Value, like: TensorGrid) -> TensorGrid:
    """A grid of the same kind for the whole of a constant."""
    array = graph.constant(value)
    assert array is not None
    scale, zero_point = codes_of(like).from_range(float(array.min()), float(array.max()))
    return replace(like, scale=scale, zero_point=zero_point)


def _emit_norm_biases(model: Model, plan: QuantPlan, inside: set[Node]) -> None:
    """Shifts of integer normalisations, in int32 steps of input times scale."""
    for node in graph.nodes(model, "LayerNormalization", "InstanceNormalization"):
        shift = graph.constant(node.inputs[2]) if node in inside and len(node.inputs) > 2 else None
        if shift is None:
            continue
        data, factor = (graph.name_of(value) for value in node.inputs[:2])
        if data in plan.tensors and factor in plan.constants:
            step = np.asarray(np.float32(plan.tensors[data].scale) * np.float32(plan.constants[factor].scale))
            node.replace_input_with(2, int32_steps(model, str(node.name), shift, step, node))


def _require(plan: QuantPlan, nodes: Mapping[str, Node], values: Mapping[str, Value]) -> Target:
    """The plan's target, once the model has everything that the plan names."""
    if plan.target not in TARGETS:
        raise UnsupportedError(f"the plan is for the target {plan.target!r}; known: {', '.join(TARGETS)}.")
    named = (*plan.weights, *plan.integer, *plan.sums, *plan.tables, *plan.log_softmax, *plan.blocks, *plan.half)
    for name in named:
        if name not in nodes:
            raise UnsupportedError(f"the plan names the node {name!r}, which this model does not have.")
    for name in (*plan.tensors, *plan.constants, *plan.guards):
        if name not in values:
            raise UnsupportedError(f"the plan names the tensor {name!r}, which this model does not have.")
    for name in (*plan.borders, *plan.dynamic):
        if name not in plan.tensors:
            how = "gives {!r} a rounding border" if name in plan.borders else "rounds {!r} in every run"
            raise UnsupportedError(f"the plan {how.format(name)}, but does not quantize it.")
    return TARGETS[plan.target]


def _layer(node: Node) -> Layer:
    layer = graph.layer_of(node)
    if isinstance(layer, str):
        raise UnsupportedError(f"the plan quantizes {node.name!r}, but {layer}.")
    return layer


def _input_grid(plan: QuantPlan, layer: Layer) -> TensorGrid:
    data = graph.name_of(layer.data)
    if data not in plan.tensors:
        raise UnsupportedError(f"the plan quantizes {layer.node.name!r}, but not its input {data!r}.")
    if max(plan.weights[str(layer.node.name)].scales) * plan.tensors[data].scale > LARGEST_PRODUCT:
        raise UnsupportedError(f"the weights and inputs of {layer.node.name!r} are so large that products overflow.")
    return plan.tensors[data]


def _codes(layer: Layer, weights: WeightGrid, learned: LearnedLayer | None) -> npt.NDArray[np.int8]:
    """The layer's codes, learned or rounded, once everything fits."""
    name, count = layer.node.name, len(weights.scales)
    whole = weights.axis is None and count == 1
    if not whole and (weights.axis != layer.axis or count != layer.channels):
        raise UnsupportedError(
            f"the plan gives {name!r} {count} weight scales along axis {weights.axis}; "
            f"the weight keeps axis {layer.axis} with {layer.channels} channels."
        )
    codes = learned.codes if learned is not None else weight_codes(layer, weights)
    if codes.shape != layer.weight.shape:
        raise UnsupportedError(f"codes of shape {list(codes.shape)} were learned for {name!r}; its weight has another.")
    return codes


def _emit_weight(
    model: Model, layer: Layer, weights: WeightGrid, codes: npt.NDArray[np.int8], packer: Packer | None
) -> None:
    node = layer.node
    stored = dequantized(model, f"{node.name}.weight", codes, steps_of(weights), weights.axis, node, packer)
    node.replace_input_with(1, stored)


def weight_codes(layer: Layer, weights: WeightGrid) -> npt.NDArray[np.int8]:
    """The layer's weights rounded to the nearest codes of their grid."""
    return weights.codes(layer.weight)
