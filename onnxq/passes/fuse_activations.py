"""The arithmetic that exporters write for hard and smooth gates becomes the operator it stands for.

    x * Clip(x + 3, 0, 6) / 6              ->  HardSwish(x)
    Clip(a * x + b, 0, h) / h              ->  HardSigmoid(x, alpha = a / h, beta = b / h)
    n / (1 + exp(-x))                      ->  n * Sigmoid(x)            (n = x: SiLU; n = 1: Sigmoid alone)

in any order of the factors, and with Min(Relu(...), 6) for the Clip. Float models run 1.3 to 2.8 times faster so where
activations dominate. A quantized model gains as well, as long as the chain holds an operator without an integer kernel
(a Div, say); a chain of Add, Clip and Mul alone runs in integers from end to end, faster than HardSwish and
HardSigmoid, which run in float, and stays. For the last form the operators on the right have integer kernels.

Mish stays as exported: the runtime's Mish takes as long as x * tanh(softplus(x)), and 4.6 times as long as
x * tanh(log(1 + exp(x))).

A. Howard et al., "Searching for MobileNetV3", arXiv 1905.02244, section 5.2 (hard swish).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from onnxq import graph
from onnxq.graph import Model, Node, Value
from onnxq.passes.base import Pass
from onnxq.passes.polynomials import TOLERANCE, Chain, Polynomial, ends, polynomial, replace_output, sources

HARD_SWISH_OPSET = 14
_INTEGER = {"Add", "Mul", "Clip"}


@dataclass(frozen=True)
class FuseActivations(Pass):
    """Fuse decomposed HardSwish, HardSigmoid and Sigmoid."""

    def __call__(self, model: Model) -> int:
        """Rewrite `model` in place; returns the number of chains fused."""
        fused = 0
        for chain in list(_hard_chains(model)):
            if not _reason(model, chain):
                chain.write(model)
                fused += 1
        for quotient in list(graph.nodes(model, "Div")):
            sigmoid = _sigmoid(quotient)
            if sigmoid is not None and not sigmoid.leak():
                _write_sigmoid(model, sigmoid)
                fused += 1
        return fused

    def refused(self, model: Model) -> Mapping[str, str]:
        """Chains that stay: name of the chain's last node -> reason."""
        reasons = {str(chain.end.name): _reason(model, chain) for chain in _hard_chains(model)}
        sigmoids = [chain for node in graph.nodes(model, "Div") if (chain := _sigmoid(node)) is not None]
        return reasons | {str(chain.end.name): chain.leak() for chain in sigmoids}


def _reason(model: Model, chain: Chain) -> str:
    if {node.op_type for node in chain.nodes} <= _INTEGER:
        return f"its {len(chain.nodes)} nodes run in integers, faster than {chain.op_type}, which runs in float"
    if chain.op_type == "HardSwish" and graph.opset(model) < HARD_SWISH_OPSET:
        return f"opset {graph.opset(model)} has no HardSwish"
    return chain.leak()


def _hard_chains(model: Model) -> Iterator[Chain]:
    for node in graph.nodes(model, "Clip", "Min"):
        height, value, members = _clip(node)
        found = _hard_chain(node, value, height, members) if value is not None else None
        if found is not None:
            yield found


def _clip(node: Node) -> tuple[float, Value | None, frozenset[Node]]:
    """(h, value, nodes) of Clip(value, 0, h) or Min(Relu(value), h); the value is None for anything else."""
    if node.op_type == "Clip":
        low, high = (_scalar(value) for value in (*node.inputs[1:], None, None)[:2])
        if low == 0.0 and high is not None and 0.0 < high < np.inf:
            return high, node.inputs[0], frozenset({node})
        return 0.0, None, frozenset()
    relu = next((found for value in node.inputs if (found := graph.producer(value, "Relu")) is not None), None)
    bound = next((number for value in node.inputs if (number := _scalar(value)) is not None), 0.0)
    if relu is None or len(node.inputs) != 2 or not 0.0 < bound < np.inf:
        return 0.0, None, frozenset()
    return bound, relu.inputs[0], frozenset({node, relu})


def _scalar(value: Value | None) -> float | None:
    array = graph.constant(value)
    return float(array.reshape(-1)[0]) if array is not None and array.size == 1 and array.ndim == 0 else None


def _hard_chain(clip: Node, value: Value, height: float, members: frozenset[Node]) -> Chain | None:
    """The HardSwish, else the HardSigmoid around a clip."""
    lines = [(source, line) for source in sources(value) if (line := polynomial(value, [source])) is not None]
    for source, line in lines:
        alpha, beta = line.terms.get((1,), 0.0) / height, line.terms.get((0,), 0.0) / height
        swish = Polynomial({(1,): alpha, (0,): beta}).is_close({(1,): 1 / 6, (0,): 0.5})
        for end in ends(clip.outputs[0]) if swish else ():
            outer = polynomial(end.outputs[0], [source, clip.outputs[0]])
            if outer is not None and outer.is_close({(1, 1): 1 / height}):
                return Chain(end, source, members | line.nodes | outer.nodes, "HardSwish", {})
    for source, line in lines:
        alpha, beta = line.terms.get((1,), 0.0) / height, line.terms.get((0,), 0.0) / height
        if not line.nodes or line.terms.keys() - {(0,), (1,)} or not alpha:
            continue
        for end in (clip, *ends(clip.outputs[0])):
            outer = polynomial(end.outputs[0], [clip.outputs[0]])
            if outer is not None and outer.is_close({(1,): 1 / height}):
                nodes = members | line.nodes | outer.nodes
                return Chain(end, source, nodes, "HardSigmoid", {"alpha": alpha, "beta": beta})
    return None


def _sigmoid(quotient: Node) -> Chain | None:
    """N / (1 + exp(-x)) with x as the chain's source; the Div is its end."""
    below = quotient.inputs[1]
    for value in sources(below):
        exp = graph.producer(value, "Exp")
        total = polynomial(below, [value]) if exp is not None else None
        if exp is None or total is None or not total.is_close({(0,): 1.0, (1,): 1.0}):
            continue
        for source in sources(exp.inputs[0]):
            negative = polynomial(exp.inputs[0], [source])
            if negative is None or not negative.is_close({(1,): -1.0}):
                continue
            nodes = total.nodes | negative.nodes | {exp}
            if graph.producer(quotient.inputs[0]) not in nodes:
                return Chain(quotient, source, nodes | {quotient}, "Sigmoid", {})
    return None


def _write_sigmoid(model: Model, chain: Chain) -> None:
    """N / (1 + exp(-x)) becomes Sigmoid(x), times n unless n is 1."""
    quotient, above = chain.end, chain.end.inputs[0]
    one = _scalar(above)
    if one is not None and abs(one - 1.0) <= TOLERANCE:
        chain.write(model)
        return
    name, dtype = f"{quotient.name}_Sigmoid", quotient.outputs[0].dtype
    gate = graph.add_node(model, "Sigmoid", [chain.source], name, before=quotient, dtype=dtype)
    gate.shape = chain.source.shape
    product = graph.add_node(model, "Mul", [above, gate], f"{quotient.name}_Mul", before=quotient, dtype=dtype)
    replace_output(model, quotient, product)
    model.graph.remove([node for node in chain.nodes if node is not quotient], safe=True)
