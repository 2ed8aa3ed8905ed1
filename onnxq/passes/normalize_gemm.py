"""Gemm in its plain form: no factors, and a bias of one value per output.

    alpha * A @ B + beta * C  =  A @ (alpha * B) + (beta * C),    C of shape [1, N], [1] or [] spread to [N].

The integer kernels and their int32 bias know this form only. A transposed A is not touched.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from onnxq import graph
from onnxq.passes.base import Pass
from onnxq.types import Array


@dataclass(frozen=True)
class _Plain:
    """Constants of the plain form; None keeps what is there."""

    weight: Array | None
    bias: Array | None


@dataclass(frozen=True)
class NormalizeGemm(Pass):
    """Scale alpha and beta into the constants of Gemm nodes and make their biases vectors."""

    def __call__(self, model: graph.Model) -> int:
        """Rewrite `model` in place; returns the number of Gemm nodes changed."""
        changed = 0
        for gemm in graph.nodes(model, "Gemm"):
            plain = _plan(gemm)
            if not isinstance(plain, _Plain):
                continue
            if plain.weight is not None:
                graph.replace_constant(model, gemm, 1, plain.weight)
            if plain.bias is not None:
                graph.replace_constant(model, gemm, 2, plain.bias)
            graph.set_attribute(gemm, "alpha", None)
            graph.set_attribute(gemm, "beta", None)
            changed += 1
        return changed

    def refused(self, model: graph.Model) -> dict[str, str]:
        """Gemm nodes that are not plain and stay: node name -> reason."""
        plans = ((gemm, _plan(gemm)) for gemm in graph.nodes(model, "Gemm"))
        return {str(gemm.name): plan for gemm, plan in plans if isinstance(plan, str)}


def _plan(gemm: graph.Node) -> _Plain | str | None:
    """The constants of the plain form, why it cannot be had, or None when `gemm` has it already."""
    if graph.attribute(gemm, "transA", 0):
        return "its first operand is transposed"
    weight = graph.constant(gemm.inputs[1])
    if weight is None:
        return "its weight is not a constant"
    if weight.dtype.kind != "f":
        return f"its weight is {weight.dtype}"
    alpha, beta = graph.attribute(gemm, "alpha", 1.0), graph.attribute(gemm, "beta", 1.0)
    outputs = weight.shape[0 if graph.attribute(gemm, "transB", 0) else 1]
    bias: Array | None = None
    if len(gemm.inputs) > 2 and gemm.inputs[2] is not None:
        stored = graph.constant(gemm.inputs[2])
        if stored is None:
            return "its bias is not a constant"
        if stored.size != 1 and stored.shape not in ((outputs,), (1, outputs)):
            return f"its bias has shape {list(stored.shape)}"
        if beta != 1.0 or stored.shape != (outputs,):
            bias = _scaled(np.broadcast_to(stored.reshape(-1), (outputs,)), beta)
    scaled = _scaled(weight, alpha) if alpha != 1.0 else None
    if scaled is None and bias is None:
        return None
    if any(new is not None and not np.isfinite(new).all() for new in (scaled, bias)):
        return "its scaled constants overflow"
    return _Plain(scaled, bias)


def _scaled(array: Array, factor: float) -> Array:
    with np.errstate(over="ignore"):
        return (array.astype(np.float64) * factor).astype(array.dtype)
