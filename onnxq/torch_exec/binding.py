"""From a node to a call: which inputs and attributes go to which parameters of the operator's function.

The signature of such a function is its contract:

    def pad(data: Tensor, pads: list[int], /, value: Tensor | None = None, *, mode: Literal["constant"] = "constant")

* before `/`: inputs of the node, in order; one without a default must be there;
* between `/` and `*`: inputs that older operator sets gave as an attribute of the same name: both are understood;
* after `*`: attributes. A `Literal` lists the only values that are honoured;
* an input annotated `Tensor` arrives as one; with `list[int]`, `list[float]`, `int`, `float` as Python numbers; a
  `Literal` refuses other values, when the slice is made if the input is a constant, else when it runs;
* `num_outputs`, where a function wants it, is the attribute or else the number of the node's outputs;
* the result annotation says how many outputs there can be.
"""

from __future__ import annotations

import functools
import inspect
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import Tensor

from onnxq import graph
from onnxq.errors import UnsupportedError
from onnxq.torch_exec.tensors import ELEMENT_TYPES, from_numpy

Handler = Callable[..., Tensor | tuple[Tensor, ...]]
Convert = Callable[[Tensor], object]

_NUMBERS: dict[object, Convert] = {
    list[int]: lambda tensor: tensor.flatten().tolist(),
    list[float]: lambda tensor: tensor.flatten().tolist(),
    int: lambda tensor: int(tensor.item()),
    float: lambda tensor: float(tensor.item()),
}


@dataclass(frozen=True)
class Argument:
    """One positional argument of a call.

    Attributes:
        name: The value it is read from; empty when it is `fixed`.
        numbers: The Python type it is turned into, or None where it stays a tensor.
        fixed: What to pass when there is no such value: an attribute or a default.
    """

    name: str
    numbers: object = None
    fixed: object = None

    def of(self, tensor: Tensor) -> object:
        """`tensor` as the function wants it."""
        if self.numbers is None:
            return tensor
        if self.numbers in _NUMBERS:
            return _NUMBERS[self.numbers](tensor)
        value = tensor.item()
        if value not in get_args(self.numbers):
            raise UnsupportedError(f"{self.name} is {value}, which its readers cannot run with in torch")
        return value


@dataclass(frozen=True)
class Call:
    """A node, ready to run.

    Attributes:
        node: Its name, for messages.
        op_type: Its operator.
        handler: The function of the operator.
        arguments: Positional arguments.
        attributes: Keyword arguments.
        outputs: Names of the results, empty where nobody asked for one.
    """

    node: str
    op_type: str
    handler: Handler
    arguments: tuple[Argument, ...]
    attributes: Mapping[str, object]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class _Contract:
    inputs: tuple[inspect.Parameter, ...]
    rest: inspect.Parameter | None
    keywords: Mapping[str, inspect.Parameter]
    most_outputs: float


def bind(node: graph.Node, handler: Handler) -> Call:
    """Match `node` with the signature of `handler`.

    Raises:
        UnsupportedError: An attribute, a value of one, an input or an output that `handler` does not know.
    """
    contract = _contract(handler)
    given = {name: attr.value for name, attr in node.attributes.items()}
    arguments = _arguments(node, contract, given)
    if "num_outputs" in contract.keywords:
        given.setdefault("num_outputs", len(node.outputs))
    for name in given:
        if name not in contract.keywords:
            raise refusal(node, f"attribute {name} is not supported")
    for name, parameter in contract.keywords.items():
        if name not in given and parameter.default is parameter.empty:
            raise refusal(node, f"attribute {name} is missing")
    attributes = {name: _parse(node, contract.keywords[name], value) for name, value in given.items()}
    outputs = tuple(output.name or "" for output in node.outputs)
    if any(outputs[index] for index in range(len(outputs)) if index >= contract.most_outputs):
        raise refusal(node, f"only {contract.most_outputs:.0f} output(s) are supported")
    return Call(node.name or "", node.op_type, handler, arguments, attributes, outputs)


def refusal(node: graph.Node, reason: str) -> UnsupportedError:
    """The error that says why `node` cannot run in torch."""
    return UnsupportedError(f"node {node.name} ({node.op_type}) cannot run in torch: {reason}")


def _arguments(node: graph.Node, contract: _Contract, given: dict[str, Any]) -> tuple[Argument, ...]:
    """Arguments for the inputs; an attribute that stands for an input is taken out of `given`."""
    made = []
    for index, parameter in enumerate(contract.inputs):
        value = node.inputs[index] if index < len(node.inputs) else None
        by_name = parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        if value is not None:
            made.append(_reading(value, parameter))
        elif by_name and parameter.name in given:
            made.append(Argument("", fixed=_parse(node, parameter, given.pop(parameter.name))))
        elif parameter.default is parameter.empty:
            raise refusal(node, f"input {parameter.name} is missing")
        else:
            made.append(Argument("", fixed=parameter.default))
    for value in node.inputs[len(contract.inputs) :]:
        if value is not None and contract.rest is None:
            raise refusal(node, f"only {len(contract.inputs)} input(s) are supported")
        if value is not None and contract.rest is not None:
            made.append(_reading(value, contract.rest))
    return tuple(made)


def _reading(value: graph.Value, parameter: inspect.Parameter) -> Argument:
    kind = _wanted(parameter)
    return Argument(graph.name_of(value), numbers=None if kind is Tensor else kind)


def _parse(node: graph.Node, parameter: inspect.Parameter, value: Any) -> object:
    """An attribute's value as `parameter` is annotated."""
    kind = _wanted(parameter)
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise refusal(node, f"{parameter.name} = {value} is not supported")
        return value
    if kind is bool:
        return bool(value)
    if kind is Tensor:
        return _tensor(node, value)
    if kind is torch.dtype:
        if int(value) not in ELEMENT_TYPES:
            raise refusal(node, f"element type {value} ({parameter.name}) is not supported")
        return ELEMENT_TYPES[int(value)]
    return list(value) if isinstance(value, tuple) else value


def _tensor(node: graph.Node, value: Any) -> Tensor:
    if isinstance(value, float | int):
        return torch.tensor(value)
    try:
        return from_numpy(value.numpy())
    except KeyError as error:
        raise refusal(node, f"element type {error} is not supported") from error


def _wanted(parameter: inspect.Parameter) -> Any:
    """The annotation without its `| None`."""
    kind = parameter.annotation
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (option for option in get_args(kind) if option is not types.NoneType)
    return kind


@functools.cache
def _contract(handler: Handler) -> _Contract:
    signature = inspect.signature(handler, eval_str=True)
    parameters = list(signature.parameters.values())
    result = signature.return_annotation
    parts = get_args(result) if get_origin(result) is tuple else (result,)
    return _Contract(
        tuple(p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)),
        next((p for p in parameters if p.kind is p.VAR_POSITIONAL), None),
        {p.name: p for p in parameters if p.kind is p.KEYWORD_ONLY},
        math.inf if Ellipsis in parts else len(parts),
    )
