"""Products of whole numbers with float results, in the operator that the runtime computes them with.

    MatMul(DequantizeLinear(x), DequantizeLinear(w)) [+ b]  ->  com.microsoft.MatMulIntegerToFloat(x, w, steps, z, [b])

The runtime finds that operator by itself, but leaves the bias beside it: an Add over the whole result, and behind the
int32 form of a bias a DequantizeLinear in every run. A third of a small transformer's nodes are such ones. Written out,
the product is also sure to run in integers, whatever the session's settings are. And steps and z may be computed: a
DynamicQuantizeLinear gives x the grid of the values that it has in this run.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxq import graph
from onnxq.errors import UnsupportedError
from onnxq.graph import Layer, Model, Node, Value
from onnxq.types import LearnedLayer, QuantPlan

OPERATOR, DOMAIN = "MatMulIntegerToFloat", "com.microsoft"
_ACTIVATIONS = ("Relu", "Clip")


def products(model: Model) -> Iterator[Node]:
    """The nodes that `write_product` made."""
    return (node for node in model.graph if node.op_type == OPERATOR and node.domain == DOMAIN)


def weight_grid(node: Node) -> list[Value]:
    """Steps and, where they are written, zero points of a quantized layer's weight; nothing where it is float."""
    if node.op_type == OPERATOR:
        held = [*node.inputs[3:4], *node.inputs[5:6]]
    else:
        restored = graph.producer(node.inputs[1], "DequantizeLinear")
        held = [] if restored is None else list(restored.inputs[1:])
    return [value for value in held if value is not None]


def has_float_result(layer: Layer, plan: QuantPlan) -> bool:
    """Whether a MatMul multiplies codes of 8 bits and hands on floats: nothing behind it, or its Relu, rounds them.

    Matrices, tensors of two axes, are left out: the runtime makes a Gemm of the MatMul and its bias, which has one.
    """
    data, shape = plan.tensors.get(graph.name_of(layer.data)), layer.data.shape
    if layer.node.op_type != "MatMul" or data is None or data.bits > 8 or data.signed:
        return False
    if layer.bias_add is not None and shape is not None and len(shape) == 2:
        return False
    reader = graph.only_user(layer.output)
    results = (
        [layer.output] if reader is None or reader.op_type not in _ACTIVATIONS else [layer.output, *reader.outputs]
    )
    return not any(graph.name_of(value) in plan.tensors for value in results) and (
        layer.bias_add is None or layer.bias_add.name not in plan.integer
    )


def write_product(model: Model, layer: Layer, learned: LearnedLayer | None) -> None:
    """Replace an emitted MatMul, and the Add that holds its bias, in place; the new node keeps the MatMul's name.

    Args:
        model: With the pairs of the layer's input and the codes of its weight; gets the operator set com.microsoft.
        layer: As it was in the float model, of the same nodes.
        learned: May hold another bias.

    Raises:
        UnsupportedError: It does, and the layer has no Add.
    """
    node, name = layer.node, str(layer.node.name)
    data, weight = (graph.producer(value, "DequantizeLinear") for value in node.inputs)
    if data is None or weight is None:  # in a part of the model for which the plan was not made
        return
    inputs = [data.inputs[0], weight.inputs[0], data.inputs[1], weight.inputs[1], data.inputs[2], None]
    floats = layer.bias if learned is None or learned.bias is None else learned.bias
    if layer.bias_add is None and floats is not None:
        raise UnsupportedError(f"a bias was learned for {name!r}, which has no Add to hold it.")
    if floats is not None:
        inputs.append(graph.add_constant(model, f"{name}.bias", floats.astype(np.float32)))
    last = layer.bias_add or node
    old = last.outputs[0]
    model.opset_imports.setdefault(DOMAIN, 1)
    new = graph.add_node(model, OPERATOR, inputs, f"{name}_codes", before=last, domain=DOMAIN)
    new.type, new.shape = old.type, old.shape
    graph.redirect(old, new)
    graph.move_name(old, new, model)
    made: Node | None = new.producer()
    assert made is not None
    model.graph.remove([last, node] if last is not node else [node], safe=True)
    made.name = name


def round_dynamically(model: Model, value: Value) -> None:
    """Round a tensor that emitted products read to the range of its values in every run, in place.

    Args:
        model: With the products written.
        value: The tensor, with its pair.

    Raises:
        UnsupportedError: Something else reads its codes, or nothing does.
    """
    rounding = next((node for node in graph.users(value) if node.op_type == "QuantizeLinear"), None)
    readers = list(graph.users(rounding.outputs[0])) if rounding is not None else []
    used = [node for node in readers if node.op_type != "DequantizeLinear" or any(graph.users(node.outputs[0]))]
    if rounding is None or not used or any(node.op_type != OPERATOR for node in used):
        raise UnsupportedError(
            f"the plan rounds {value.name!r} in every run, but not all that read it are products with float results."
        )
    names = [f"{value.name}_{end}" for end in ("q_of_run", "scale_of_run", "zero_point_of_run")]
    made = graph.add_wide_node(model, "DynamicQuantizeLinear", [value], names, before=rounding)
    for node in used:
        for place, operand in zip((0, 2, 4), made, strict=True):
            node.replace_input_with(place, operand)
