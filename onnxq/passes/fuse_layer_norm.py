"""Layer normalisation in small steps becomes one LayerNormalization.

    gamma * (x - mean(x)) / sqrt(mean((x - mean(x))^2) + epsilon) + beta
        ->  LayerNormalization<axis = -1, epsilon>(x, gamma, beta)

for means over the last axis; the forms of the chain are listed in `norm_chains`. The operator exists from opset 17 on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from onnxq import graph
from onnxq.graph import Model, Node
from onnxq.passes.base import Pass
from onnxq.passes.norms import Norm, norm_at

FIRST_OPSET = 17


@dataclass(frozen=True)
class FuseLayerNorm(Pass):
    """Fuse decomposed layer normalisation."""

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of chains fused."""
        fused = 0
        for sqrt in list(graph.nodes(model, "Sqrt")):
            norm = _fusible(model, sqrt)
            if isinstance(norm, Norm):
                _write(model, norm)
                fused += 1
        return fused

    def refused(self, model: Model) -> Mapping[str, str]:
        """Chains that stay: name of their Sqrt -> reason."""
        reasons = {str(sqrt.name): _fusible(model, sqrt) for sqrt in graph.nodes(model, "Sqrt")}
        return {name: reason for name, reason in reasons.items() if isinstance(reason, str) and reason}


def _fusible(model: Model, sqrt: Node) -> Norm | str:
    norm = norm_at(sqrt)
    if isinstance(norm, str):
        return norm
    if norm.kind != "layer":
        return ""
    if norm.axis != -1:
        return f"it normalises over axis {norm.axis}, not over the last"
    if graph.opset(model) < FIRST_OPSET:
        return f"LayerNormalization needs opset {FIRST_OPSET}; the model has {graph.opset(model)}"
    return norm


def _write(model: Model, norm: Norm) -> None:
    last, old = norm.nodes[-1], norm.output
    gamma = graph.add_constant(model, f"{last.name}_gamma", norm.gamma)
    zeros = np.zeros_like(norm.gamma)
    beta = graph.add_constant(model, f"{last.name}_beta", zeros if norm.beta is None else norm.beta)
    new = graph.add_node(
        model,
        "LayerNormalization",
        [norm.source, gamma, beta],
        f"{last.name}_norm",
        before=last,
        attributes={"axis": -1, "epsilon": norm.epsilon},
    )
    new.shape, new.type = old.shape, old.type
    graph.redirect(old, new)
    if old.is_graph_output():
        graph.move_name(old, new, model)
    model.graph.remove(list(norm.nodes), safe=True)
