"""The arithmetic that exporters write for GELU becomes one Gelu node.

    x / 2 * (1 + erf(x / sqrt(2)))                                  ->  Gelu(x)
    x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3)))         ->  Gelu(x, approximate = "tanh")

in any order of the factors. The runtime does it by itself for the first form, but not behind a DequantizeLinear, where
the chain takes 1.9 times as long as Gelu; the second form takes 2.6 times as long, but for one order of its factors.
Gelu exists from opset 20 on. QuickGELU, x * sigmoid(1.702 * x), has no operator and stays.

D. Hendrycks, K. Gimpel, "Gaussian Error Linear Units (GELUs)", arXiv 1606.08415, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from onnxq import graph
from onnxq.graph import Model, Node
from onnxq.passes.base import Pass
from onnxq.passes.polynomials import Chain, Powers, ends, polynomial, sources

GELU_OPSET = 20
_SLOPE = math.sqrt(2 / math.pi)
_INNER: Mapping[str, Mapping[Powers, float]] = {
    "Erf": {(1,): 1 / math.sqrt(2)},
    "Tanh": {(1,): _SLOPE, (3,): 0.044715 * _SLOPE},
}
_OUTER: Mapping[Powers, float] = {(1, 0): 0.5, (1, 1): 0.5}
"""In x and the result of Erf or Tanh."""


@dataclass(frozen=True)
class FuseGelu(Pass):
    """Fuse decomposed GELU."""

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of chains fused."""
        fused = 0
        for core in graph.nodes(model, *_INNER):
            chain = _chain(core)
            if chain is not None and not _reason(model, chain):
                chain.write(model)
                fused += 1
        return fused

    def refused(self, model: Model) -> Mapping[str, str]:
        """GELU chains that stay: name of the chain's last node -> reason."""
        chains = (_chain(core) for core in graph.nodes(model, *_INNER))
        return {str(chain.end.name): _reason(model, chain) for chain in chains if chain is not None}


def gelu_nodes(model: Model) -> set[Node]:
    """Nodes of chains that this pass makes a Gelu of, or below opset 20 the runtime: of the first form alone."""
    kinds = _INNER if graph.opset(model) >= GELU_OPSET else ("Erf",)
    chains = (_chain(core) for core in graph.nodes(model, *kinds))
    return {node for chain in chains if chain is not None and not chain.leak() for node in chain.nodes}


def _reason(model: Model, chain: Chain) -> str:
    if graph.opset(model) < GELU_OPSET:
        return f"opset {graph.opset(model)} has no Gelu"
    return chain.leak()


def _chain(core: Node) -> Chain | None:
    """The GELU chain around an Erf or Tanh."""
    for source in sources(core.inputs[0]):
        inner = polynomial(core.inputs[0], [source])
        if inner is None or not inner.is_close(_INNER[core.op_type]):
            continue
        for end in ends(core.outputs[0]):
            outer = polynomial(end.outputs[0], [source, core.outputs[0]])
            if outer is not None and outer.is_close(_OUTER):
                approximate = "none" if core.op_type == "Erf" else "tanh"
                nodes = inner.nodes | outer.nodes | {core}
                return Chain(end, source, nodes, "Gelu", {"approximate": approximate})
    return None
