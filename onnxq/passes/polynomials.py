"""Chains of arithmetic read as polynomials, so that it does not matter in which order an exporter wrote them.

0.5 * x * (1 + g),  x * (0.5 * (1 + g))  and  (x * 0.5) + (x * 0.5) * g  all are  {(1, 0): 0.5, (1, 1): 0.5}  in (x, g).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from onnxq import graph
from onnxq.graph import Model, Node, Value

Powers = tuple[int, ...]
TOLERANCE = 1e-3
"""Largest relative difference between a coefficient and what it should be; exporters write 1.41 or 1.4142135."""
_ARITHMETIC = ("Add", "Sub", "Mul", "Div", "Neg", "Pow")
_MAX_DEGREE = 4
_MAX_NODES = 12


@dataclass(frozen=True)
class Polynomial:
    """Coefficients by the powers of the variables, and the nodes that compute it."""

    terms: Mapping[Powers, float]
    nodes: frozenset[Node] = frozenset()

    def is_close(self, wanted: Mapping[Powers, float]) -> bool:
        """Whether it has these terms and no others, up to `TOLERANCE`."""
        return self.terms.keys() == wanted.keys() and all(
            abs(self.terms[powers] - value) <= TOLERANCE * abs(value) for powers, value in wanted.items()
        )


@dataclass(frozen=True)
class Chain:
    """A chain of nodes that one operator replaces.

    Attributes:
        end: The node that returns the result.
        source: The tensor the chain is a function of.
        nodes: All nodes of the chain, `end` among them.
        op_type: The operator.
        attributes: Its attributes.
    """

    end: Node
    source: Value
    nodes: frozenset[Node]
    op_type: str
    attributes: Mapping[str, float | str]

    def leak(self) -> str:
        """Why an inner value of the chain has to stay; empty when none has."""
        for node in self.nodes - {self.end}:
            output = node.outputs[0]
            if output.is_graph_output() or any(user not in self.nodes for user in graph.users(output)):
                return f"{node.name} inside it is read elsewhere, too"
        return ""

    def write(self, model: Model) -> Value:
        """Put the operator in the chain's place; returns its result."""
        old = self.end.outputs[0]
        name = f"{self.end.name}_{self.op_type}"
        new = graph.add_node(
            model, self.op_type, [self.source], name, before=self.end, attributes=self.attributes, dtype=old.dtype
        )
        replace_output(model, self.end, new)
        model.graph.remove([node for node in self.nodes if node is not self.end], safe=True)
        return new


def replace_output(model: Model, node: Node, new: Value) -> None:
    """Let `new` stand for the output of `node`, and remove `node`."""
    old = node.outputs[0]
    new.shape = old.shape
    graph.redirect(old, new)
    if old.is_graph_output():
        graph.move_name(old, new, model)
    model.graph.remove(node, safe=True)


def polynomial(value: Value | None, variables: Sequence[Value], depth: int = 8) -> Polynomial | None:
    """`value` as a polynomial in `variables`, or None when it is none.

    Only polynomials of degree 4 at most, in chains of `depth` nodes at most.
    """
    if value is None:
        return None
    if value in variables:
        return Polynomial({tuple(int(value is variable) for variable in variables): 1.0})
    number = _number(value, variables[0])
    if number is not None:
        return Polynomial({(0,) * len(variables): number})
    node = graph.producer(value, *_ARITHMETIC)
    if node is None or node.domain not in ("", "ai.onnx") or not depth:
        return None
    operands: list[Polynomial] = []
    for operand in node.inputs:
        found = polynomial(operand, variables, depth - 1)
        if found is None:
            return None
        operands.append(found)
    terms = _combine(node.op_type, [operand.terms for operand in operands])
    if terms is None or any(sum(powers) > _MAX_DEGREE for powers in terms):
        return None
    return Polynomial(terms, frozenset({node}).union(*(operand.nodes for operand in operands)))


def _combine(op_type: str, operands: Sequence[Mapping[Powers, float]]) -> dict[Powers, float] | None:
    first, second = operands[0], operands[-1]
    if op_type == "Neg":
        return {powers: -value for powers, value in first.items()}
    if op_type in ("Add", "Sub"):
        sign = 1.0 if op_type == "Add" else -1.0
        total = {key: first.get(key, 0.0) + sign * second.get(key, 0.0) for key in {**first, **second}}
        return {powers: value for powers, value in total.items() if value}
    if op_type == "Mul":
        return _times(first, second)
    number = next(iter(second.values()), 0.0)
    if any(sum(powers) for powers in second) or not number:
        return None
    if op_type == "Div":
        return {powers: value / number for powers, value in first.items()}
    if number not in (1.0, 2.0, 3.0):
        return None
    result = dict(first)
    for _ in range(int(number) - 1):
        result = _times(result, first)
    return result


def _times(first: Mapping[Powers, float], second: Mapping[Powers, float]) -> dict[Powers, float]:
    result: dict[Powers, float] = {}
    for left, a in first.items():
        for right, b in second.items():
            powers = tuple(i + j for i, j in zip(left, right, strict=True))
            result[powers] = result.get(powers, 0.0) + a * b
    return result


def _number(value: Value, beside: Value) -> float | None:
    """A constant of one element that does not widen `beside` by broadcasting.

    Only float32: as an operator takes operands of one type, the whole chain is float32 then.
    """
    array = graph.constant(value)
    if array is None or array.size != 1 or array.dtype != np.float32:
        return None
    rank = len(beside.shape) if beside.shape is not None else 0
    return float(array.reshape(-1)[0]) if array.ndim <= rank else None


def sources(value: Value | None) -> list[Value]:
    """The tensors that `value` may be a polynomial of, the farthest first."""
    found: dict[Value, None] = {}
    queue = [value]
    while queue and len(found) < _MAX_NODES:
        head = queue.pop(0)
        if head is None or head in found or graph.constant(head) is not None:
            continue
        found[head] = None
        maker = graph.producer(head, *_ARITHMETIC)
        queue.extend(maker.inputs if maker is not None else ())
    return list(found)[::-1]


def ends(value: Value) -> Iterator[Node]:
    """Arithmetic nodes that `value` reaches through arithmetic alone, the nearest first."""
    seen: dict[Node, None] = {}
    queue = [value]
    while queue and len(seen) < _MAX_NODES:
        for node in graph.users(queue.pop(0)):
            if node.op_type in _ARITHMETIC and node not in seen:
                seen[node] = None
                queue.append(node.outputs[0])
                yield node
