"""Does a slice compute in torch what onnxruntime computes?"""

from __future__ import annotations

import numpy as np
import torch

from onnxq import graph
from onnxq.runtime import Session, SessionConfig
from onnxq.torch_exec.slice import Slice
from onnxq.torch_exec.tensors import to_numpy
from onnxq.types import Array, Feeds


def check(slice_: Slice, model: graph.Model, feeds: Feeds) -> float:
    """The largest difference between a slice in torch and the same nodes in onnxruntime.

    Args:
        slice_: A slice of `model`, on any device.
        model: Where it was cut out; left as it is.
        feeds: Arrays for the slice's inputs.

    Returns:
        The largest |torch - onnxruntime| of an output over its range (largest minus smallest value in onnxruntime; 1
        where that is zero), over all outputs; infinite when a shape or the place of a NaN or infinity differs.

    Raises:
        ModelError: onnxruntime cannot load the nodes.
        DataError: It cannot run them on `feeds`.
    """
    names = slice_.inputs
    session = Session(graph.sub_model(model, names, slice_.outputs), SessionConfig(optimize="off"))
    expected = session.run({name: feeds[name] for name in names})
    device = next((buffer.device for buffer in slice_.buffers()), torch.device("cpu"))
    with torch.no_grad():
        found = slice_({name: torch.from_numpy(np.array(feeds[name])).to(device) for name in names})
    return max(_difference(to_numpy(found[name]), expected[name]) for name in slice_.outputs)


def _difference(found: Array, expected: Array) -> float:
    if found.shape != expected.shape:
        return float("inf")
    a, b = found.astype(np.float64), expected.astype(np.float64)
    finite = np.isfinite(b)
    if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
        return float("inf")
    a, b = a[finite], b[finite]
    if b.size == 0:
        return 0.0
    return float(np.abs(a - b).max() / (float(np.ptp(b)) or 1.0))
