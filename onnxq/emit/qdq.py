"""QuantizeLinear / DequantizeLinear in exactly the patterns that onnxruntime's CPU kernels absorb.

    x -> Q -> DQ -+                                     one pair per quantized tensor, directly behind its producer
    w_q ----> DQ -+-> Conv|Gemm|MatMul -> [Relu|Clip] -> Q -> DQ -> ...
    b_q ----> DQ -+                                     int32, scale = x scale * weight scale, zero point 0

Weights are int8 initializers called `<node>.weight_q`, or bytes that nodes unpack into that (`packing`); biases are
int32 ones called `<node>.bias_q`. Weight axes follow the operator: Conv 0, Gemm 1 (transB=1: 0), MatMul 1; the runtime
fuses a wrong axis without a word, so emission checks the length of the scales against the weight.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.emit.borders import shifted
from onnxq.emit.compact import compact
from onnxq.emit.log_softmax import emit_log_softmax
from onnxq.emit.packing import Packer
from onnxq.emit.tables import store_table
from onnxq.errors import UnsupportedError
from onnxq.graph import Layer, Model, Node, Value
from onnxq.grid import Grid, quantize
from onnxq.types import Border, LearnedLayer, QuantPlan, TensorGrid, WeightGrid

RUNTIME = "com.microsoft"
LARGEST_PRODUCT = 1e38
"""Of a step of weights and that of their input: the scale of the bias, a float32."""


def emit(
    model: Model,
    plan: QuantPlan,
    metadata: Mapping[str, str] | None = None,
    learned: Mapping[str, LearnedLayer] | None = None,
    *,
    packed: bool = False,
) -> Model:
    """The quantized model of `plan`.

    Args:
        model: The prepared float model the plan was made for; left as it is.
        plan: Grids and placement.
        metadata: Provenance for the file's `metadata_props`.
        learned: Codes and biases that replace plain rounding, by node name; entries of nodes whose weights the plan
            does not quantize are not looked at.
        packed: Store weight codes of up to 6 bits packed, and give all that is added short names: a smaller file of the
            same outputs and kernels that takes a little longer to load.

    Raises:
        UnsupportedError: The plan names tensors or nodes that the model does not have, or what was learned does not
            fit: codes of another shape, or a bias for a MatMul without an Add behind it.
    """
    learned = learned or {}
    quantized = model.clone()
    nodes, values = graph.node_names(quantized), graph.value_map(quantized)
    _require(plan, nodes, values)
    layers = {name: _layer(nodes[name]) for name in plan.weights}
    codes = {name: _codes(layer, plan.weights[name], learned.get(name)) for name, layer in layers.items()}
    packer = _packer(quantized, plan, codes) if packed else None
    for name, layer in layers.items():
        _emit_weight(quantized, layer, plan.weights[name], codes[name], packer)
        _emit_bias(quantized, layer, plan.weights[name], _input_grid(plan, layer).scale, learned.get(name))
    integer = set(plan.integer)
    inside = {node for node in nodes.values() if node.name in integer}
    for name in plan.constants:
        _emit_constant(quantized, values[name], plan.constants[name], inside)
    for name in plan.tensors:
        _emit_pair(quantized, values[name], plan.tensors[name], inside, name in plan.guards, plan.borders.get(name))
    for name, grid in plan.log_softmax.items():
        emit_log_softmax(quantized, nodes[name], grid, inside)
    for name in plan.guards:
        if name not in plan.tensors:
            _guard(quantized, values[name])
    for name in plan.sums:
        _as_sum(quantized, nodes[name])
    for name in plan.tables:
        store_table(quantized, nodes[name])
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
    return Packer(model, stored, {name: grid.along(grid.middles(), stored[name].ndim) for name, grid in grids.items()})


def _require(plan: QuantPlan, nodes: Mapping[str, Node], values: Mapping[str, Value]) -> None:
    for name in (*plan.weights, *plan.integer, *plan.sums, *plan.tables, *plan.log_softmax):
        if name not in nodes:
            raise UnsupportedError(f"the plan names the node {name!r}, which this model does not have.")
    for name in (*plan.tensors, *plan.constants, *plan.guards):
        if name not in values:
            raise UnsupportedError(f"the plan names the tensor {name!r}, which this model does not have.")
    for name in plan.borders:
        if name not in plan.tensors:
            raise UnsupportedError(f"the plan gives {name!r} a rounding border, but does not quantize it.")


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
    stored = _dequantized(model, f"{node.name}.weight", codes, _steps(weights), weights.axis, node, packer)
    node.replace_input_with(1, stored)


def _emit_bias(
    model: Model, layer: Layer, weights: WeightGrid, input_scale: float, learned: LearnedLayer | None
) -> None:
    node, name = layer.node, str(layer.node.name)
    floats = layer.bias if learned is None or learned.bias is None else learned.bias
    if floats is None and node.op_type == "Gemm":  # the runtime would fuse a bare one with a Sum or Transpose behind it
        floats = np.zeros(layer.channels, np.float32)
    if floats is None:
        return
    if layer.bias_add is None:
        if node.op_type == "MatMul":
            raise UnsupportedError(f"a bias was learned for {name!r}, which has no Add to hold it.")
        node.resize_inputs(3)
    bias_steps = (np.float32(input_scale) * _steps(weights)).astype(np.float32)
    holder = layer.bias_add or node
    bias_codes = np.clip(np.rint(floats.astype(np.float64) / bias_steps), -(2**31) + 1, 2**31 - 1)
    bias_axis = None if bias_steps.ndim == 0 else 0
    bias = _dequantized(model, f"{name}.bias", bias_codes.astype(np.int32), bias_steps, bias_axis, node)
    holder.replace_input_with(_bias_index(layer), bias)


def _steps(weights: WeightGrid) -> npt.NDArray[np.float32]:
    """The steps of a weight, a scalar where one serves all."""
    steps = np.asarray(weights.scales, np.float32)
    return steps if weights.axis is not None else steps.reshape(())


def weight_codes(layer: Layer, weights: WeightGrid) -> npt.NDArray[np.int8]:
    """The layer's weights rounded to the nearest codes of their grid."""
    return weights.codes(layer.weight)


def _bias_index(layer: Layer) -> int:
    if layer.bias_add is None:
        return 2
    return 1 if layer.bias_add.inputs[0] is layer.node.outputs[0] else 0


def _dequantized(
    model: Model,
    name: str,
    codes: np.ndarray,
    steps: np.ndarray,
    axis: int | None,
    before: Node,
    packer: Packer | None = None,
) -> Value:
    """A DequantizeLinear of stored codes, in front of the node that reads it."""
    wanted = f"{name}_q"
    stored = packer.store(wanted, codes, before) if packer else graph.add_constant(model, wanted, codes)
    scale = graph.add_constant(model, f"{name}_scale", steps)
    inputs = [stored, scale]
    if codes.dtype == np.int8:  # Gemm is not fused without an explicit zero point of its weight
        zeros = np.zeros(steps.shape, codes.dtype)
        inputs.append(packer.zeros(steps.shape) if packer else graph.add_constant(model, f"{name}_zero_point", zeros))
    attributes = {} if axis is None else {"axis": axis}
    return graph.add_node(model, "DequantizeLinear", inputs, f"{name}_dq", before=before, attributes=attributes)


def _grid_constants(model: Model, name: str, grid: TensorGrid) -> tuple[Value, Value]:
    scale = graph.add_constant(model, f"{name}_scale", np.asarray(grid.scale, np.float32))
    zero = np.asarray(grid.zero_point, _codes_of(grid).dtype)
    return scale, graph.add_constant(model, f"{name}_zero_point", zero)


def _codes_of(grid: TensorGrid) -> Grid:
    return Grid(grid.bits, grid.signed, symmetric=False)


def _rounding_domain(model: Model, grid: TensorGrid) -> str:
    """Where QuantizeLinear takes the grid's codes: 16 bits only in onnxruntime's own domain before opset 21."""
    if grid.bits <= 8 or graph.opset(model) >= 21:
        return ""
    model.opset_imports[RUNTIME] = 1
    return RUNTIME


def _emit_constant(model: Model, value: Value, grid: TensorGrid, inside: set[Node]) -> None:
    """A constant operand of integer nodes, stored in codes; float nodes keep the float original."""
    array = graph.constant(value)
    assert array is not None
    name = graph.name_of(value)

    def reads(node: Node) -> bool:
        """The same initializer may also be a bound of a Clip."""
        return node in inside and node.op_type in ("Add", "Mul", "Concat")

    first = next((user for user in graph.users(value) if reads(user)), None)
    if first is None:  # in a part of the model for which the plan was made
        return
    codes = quantize(array, grid.scale, grid.zero_point, _codes_of(grid))
    scale, zero = _grid_constants(model, name, grid)
    stored = graph.add_constant(model, f"{name}_q", codes.astype(_codes_of(grid).dtype))
    domain = _rounding_domain(model, grid)
    inputs = [stored, scale, zero]
    restored = graph.add_node(model, "DequantizeLinear", inputs, f"{name}_dq", before=first, domain=domain)
    graph.redirect(value, restored, reads)


def _emit_pair(
    model: Model, value: Value, grid: TensorGrid, inside: set[Node], guarded: bool, border: Border | None
) -> None:
    """Q and DQ behind `value`; who reads the result is the grid's business (`TensorGrid.everywhere`)."""
    name = graph.name_of(value)
    made: list[Node] = []

    def behind(op_type: str, inputs: list[Value], suffix: str, domain: str = "") -> Value:
        """Append a node to the chain that starts at `value`."""
        last = made[-1] if made else value.producer()
        before = model.graph[0] if last is None else None
        output = graph.add_node(model, op_type, inputs, f"{name}_{suffix}", after=last, before=before, domain=domain)
        node = output.producer()
        assert node is not None
        made.append(node)
        return output

    source = behind("Sum", [value], "guard") if guarded else value
    if border is not None:
        source = shifted(model, name, source, grid, border, behind)
    if grid.bits < 8:
        source = behind("Clip", [source, *_clip_bounds(model, name, grid)], "clip")
    scale, zero = _grid_constants(model, name, grid)
    domain = _rounding_domain(model, grid)
    codes = behind("QuantizeLinear", [source, scale, zero], "q", domain)
    restored = behind("DequantizeLinear", [codes, scale, zero], "dq", domain)
    graph.redirect(value, restored, lambda node: node not in made and (grid.everywhere or node in inside))
    if value.is_graph_output() and grid.everywhere:
        graph.move_name(value, restored, model)


def _clip_bounds(model: Model, name: str, grid: TensorGrid) -> list[Value]:
    """The ends of a grid of fewer than 8 bits: clipped there, its codes are the only ones that occur."""
    codes = _codes_of(grid)
    ends = {"low": codes.qmin, "high": codes.qmax}
    return [
        graph.add_constant(model, f"{name}_{end}", np.asarray((code - grid.zero_point) * grid.scale, np.float32))
        for end, code in ends.items()
    ]


def _guard(model: Model, value: Value) -> None:
    """A one-input Sum between a float value and all its readers."""
    copy = graph.add_node(model, "Sum", [value], f"{graph.name_of(value)}_guard", after=value.producer())
    graph.redirect(value, copy, skip=copy.producer())


def _as_sum(model: Model, node: Node) -> None:
    """Write an Add as Sum, which the runtime does not fuse into its slower SkipLayerNormalization."""
    output = graph.add_node(model, "Sum", list(node.inputs), f"{node.name}_sum", before=node)
    old = node.outputs[0]
    output.shape, output.type = old.shape, old.type
    graph.redirect(old, output)
    graph.move_name(old, output, model)
    model.graph.remove(node, safe=True)
