"""Short names for what emission added: in a small file of few bits, the names are a third of the bytes."""

from __future__ import annotations

from itertools import count

from onnxq import graph
from onnxq.graph import Model


def compact(quantized: Model, model: Model) -> None:
    """Shorten the names of nodes and values that `model` does not have, and drop recorded types of initializers.

    Args:
        quantized: What was made of `model`; edited in place.
        model: Left as it is; its names stay.
    """
    kept = {*graph.value_map(model), *graph.node_names(model)}
    names = (graph.unique_name(quantized, f"q{number}") for number in count())
    for value in list(quantized.graph.initializers.values()):
        value.shape = value.type = None
        if value.name not in kept:
            value.name = next(names)
    for node in quantized.graph:
        for output in node.outputs:
            if output.name and output.name not in kept:
                output.name = next(names)
        if node.name not in kept:
            node.name = node.outputs[0].name
