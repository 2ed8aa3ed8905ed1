"""The smallest and largest value of every float tensor of a model, on some rows: what any target's grids start from."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from onnxq import graph
from onnxq.graph import Model
from onnxq.runtime import Session, SessionConfig
from onnxq.types import Feeds

Extremes = dict[str, tuple[float, float]]


def extremes(
    model: Model, rows: Iterable[Feeds], *, config: SessionConfig = SessionConfig(stop_spinning=True)
) -> Extremes:
    """(smallest, largest) by name, float32 inputs included; tensors that ever hold infinities or NaN are left out.

    Args:
        model: The prepared float model.
        rows: Small batches: all tensors of one are in memory together.
        config: How to run.
    """
    shaped = model.clone()
    graph.infer_shapes(shaped)
    names = [name for name, value in graph.value_map(shaped).items() if _computed(value)]
    fed = {spec[0] for spec in graph.input_specs(model)}
    inner = [name for name in names if name not in fed]
    session = Session(graph.with_outputs(model, inner, keep=False), config) if inner else None
    found: Extremes = {}
    broken: set[str] = set()
    for feeds in rows:
        values = session.run({spec.name: feeds[spec.name] for spec in session.inputs}, inner) if session else {}
        for name in names:
            array = np.asarray(values[name] if name in values else feeds[name])
            if array.dtype != np.float32 or not array.size:
                continue
            low, high = float(array.min()), float(array.max())
            if not np.isfinite([low, high]).all():
                broken.add(name)
                continue
            least, most = found.get(name, (low, high))
            found[name] = min(least, low), max(most, high)
    return {name: ends for name, ends in found.items() if name not in broken}


def _computed(value: graph.Value) -> bool:
    """Whether a value is a float32 tensor that is fed or computed."""
    return graph.constant(value) is None and graph.dtype_name(value) == "float32"
