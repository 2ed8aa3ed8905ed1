"""General graph simplification by onnxsim: constant shapes folded, no-ops and duplicates removed.

It is native code that can crash, hang or eat memory on odd models, so it runs in a child process with a time
and a memory limit, and whatever happens there, quantization goes on with the model as it was.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from threading import Event

import onnx_ir as ir

from onnxq import graph
from onnxq.errors import OnnxqError

CHILD = Path(__file__).with_name("child.py")
"""The child's program."""
APART = 1 << 28
"""Above this many bytes of weights the large ones stay here, and onnxsim takes them for inputs."""
LARGEST_ALONG = 1 << 20
"""Bytes of a weight that goes along all the same. What onnxsim would fold of larger ones, `FoldConstants` does."""
_GIB = 1 << 30


def simplify(
    model: graph.Model,
    *,
    timeout_s: float = 120,
    memory_bytes: int | None = None,
    stop: Event | None = None,
) -> tuple[graph.Model, str | None]:
    """Simplify `model`, if that works.

    Inputs and outputs keep their names, order, types and shapes, dynamic axes included; the operator set
    stays.

    Args:
        model: Left as it is.
        timeout_s: Wall-clock seconds the child process may take.
        memory_bytes: Address space the child process may take; None: 8 GiB and six times the weights.
        stop: Ends the child early when it is set, by another thread.

    Returns:
        The simplified model and None; or `model` itself and one sentence that says why it was not simplified.
    """
    limit = 8 * _GIB + 6 * graph.nbytes(model) if memory_bytes is None else memory_bytes
    given = graph.weights_as_inputs(model, LARGEST_ALONG) if graph.nbytes(model) > APART else model
    try:
        with tempfile.TemporaryDirectory(prefix="onnxq-") as folder:
            source, destination = Path(folder) / "model.onnx", Path(folder) / "simplified.onnx"
            graph.save(_with_output_shapes(given), source)
            failure = graph.run_confined(CHILD, source, destination, timeout_s=timeout_s, memory_bytes=limit, stop=stop)
            if failure is not None:
                return model, f"simplification {failure}; continuing without it"
            simplified = graph.load(destination)
            ir.external_data.load_to_model(simplified)  # the folder is about to disappear
    except OSError as error:
        return model, f"simplification failed ({error.strerror or error}); continuing without it"
    except OnnxqError as error:
        return model, f"simplification failed ({_one_line(str(error))}); continuing without it"
    if given is not model:
        graph.inputs_as_weights(simplified, model, LARGEST_ALONG)
    difference = _restore_interface(simplified, model)
    if difference is not None:
        return model, f"simplification changed the model's {difference}; continuing without it"
    return simplified, None


def _with_output_shapes(model: graph.Model) -> graph.Model:
    """`model`, or a copy with inferred shapes when an output has none: onnxsim rejects that."""
    if all(output.shape is not None for output in model.graph.outputs):
        return model
    copy = model.clone()
    graph.infer_shapes(copy)
    return copy


def _one_line(text: str) -> str:
    text = " ".join(text.split()).rstrip(".")
    return text if len(text) <= 200 else f"{text[:197]}..."


def _restore_interface(simplified: graph.Model, model: graph.Model) -> str | None:
    """Put back what identifies the model from outside; returns what cannot be put back."""
    for kind, new, old in (
        ("inputs", simplified.graph.inputs, model.graph.inputs),
        ("outputs", simplified.graph.outputs, model.graph.outputs),
    ):
        if [(value.name, value.dtype) for value in new] != [(value.name, value.dtype) for value in old]:
            return kind
        for value, before in zip(new, old, strict=True):
            if before.shape is not None:
                value.shape = before.shape.copy()
    if graph.opset(simplified) != graph.opset(model):
        return "operator set"
    simplified.graph.name, simplified.ir_version = model.graph.name, model.ir_version
    # onnxsim logs every node it removed into the metadata, which would travel with the quantized file.
    simplified.metadata_props.clear()
    simplified.metadata_props.update(model.metadata_props)
    return None
