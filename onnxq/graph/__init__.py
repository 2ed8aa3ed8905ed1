"""The one door to onnx-ir: reading, writing, looking at and editing graphs.

No other package knows how a graph is stored. `Model`, `Graph`, `Node` and `Value` are onnx-ir's classes; everything
done to them goes through the functions here.
"""

from onnx_ir import Graph, Model, Node, Value

from onnxq.graph.checks import require_readable
from onnxq.graph.confine import run_confined
from onnxq.graph.cut import sub_model
from onnxq.graph.edit import (
    add_constant,
    add_node,
    add_wide_node,
    bypass,
    forget_shapes,
    infer_shapes,
    lift_constants,
    move_name,
    redirect,
    remove_unused,
    replace_constant,
    set_attribute,
    set_initializer,
    unique_name,
)
from onnxq.graph.files import (
    SINGLE_FILE_LIMIT,
    atomic_path,
    digest,
    disk_bytes,
    file_digest,
    load,
    lowest_ir_version,
    model_files,
    nbytes,
    note,
    parse,
    save,
    to_bytes,
)
from onnxq.graph.layers import LAYER_OPS, PRODUCT, Activation, Layer, activation_after, as_bias, layer_of, silu_gate
from onnxq.graph.look import (
    attribute,
    constant,
    dtype_name,
    input_specs,
    name_of,
    node_names,
    nodes,
    only_user,
    opset,
    producer,
    users,
    value_map,
)
from onnxq.graph.opsets import raise_opset
from onnxq.graph.packed import FLOAT16, FLOAT32, INT8, INT32, add_packed, sources
from onnxq.graph.parts import WHOLE, inputs_as_weights, to_parts, weights_as_inputs
from onnxq.graph.slices import cut_at_codes, with_outputs
from onnxq.graph.soften import Softened, soften
from onnxq.graph.text import from_text

__all__ = [
    "FLOAT16",
    "FLOAT32",
    "INT8",
    "INT32",
    "LAYER_OPS",
    "PRODUCT",
    "SINGLE_FILE_LIMIT",
    "WHOLE",
    "Activation",
    "Graph",
    "Layer",
    "Model",
    "Node",
    "Softened",
    "Value",
    "activation_after",
    "add_constant",
    "add_node",
    "add_packed",
    "add_wide_node",
    "as_bias",
    "atomic_path",
    "attribute",
    "bypass",
    "constant",
    "cut_at_codes",
    "digest",
    "disk_bytes",
    "dtype_name",
    "file_digest",
    "forget_shapes",
    "from_text",
    "infer_shapes",
    "input_specs",
    "inputs_as_weights",
    "layer_of",
    "lift_constants",
    "load",
    "lowest_ir_version",
    "model_files",
    "move_name",
    "name_of",
    "nbytes",
    "node_names",
    "nodes",
    "note",
    "only_user",
    "opset",
    "parse",
    "producer",
    "raise_opset",
    "redirect",
    "remove_unused",
    "replace_constant",
    "require_readable",
    "run_confined",
    "save",
    "set_attribute",
    "set_initializer",
    "silu_gate",
    "soften",
    "sources",
    "sub_model",
    "to_bytes",
    "to_parts",
    "unique_name",
    "users",
    "value_map",
    "weights_as_inputs",
    "with_outputs",
]
