"""Normalisations written as chains of small operators.

    layer   d = x - mean(x),  y = gamma * d / sqrt(mean(d^2) + epsilon) + beta
    rms     y = gamma * x / sqrt(mean(x^2) + epsilon)

The squares are a Pow or a Mul; the division is a Div, or a Mul with a Reciprocal or with 1 / sqrt; x - mean(x) may be
computed twice. TensorFlow multiplies out instead:

    m = gamma / sqrt(mean(d^2) + epsilon),   y = x * m + (beta - mean(x) * m)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from onnxq import graph
from onnxq.graph import Node, Value

Kind = Literal["layer", "rms", "group", "instance"]
Slot = tuple[Node, int]
Stored = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Affine:
    """Mul and Add with one constant per channel.

    Attributes:
        nodes: The Mul and, where there is one, the Add.
        gamma: Float32 [channels].
        beta: Float32 [channels], or None.
        gamma_at: Where `gamma` is read.
        beta_at: Where `beta` is read, or None.
    """

    nodes: tuple[Node, ...]
    gamma: Stored
    beta: Stored | None
    gamma_at: Slot
    beta_at: Slot | None


@dataclass(frozen=True)
class Norm:
    """A normalisation with its scale and shift per channel.

    Attributes:
        nodes: Its nodes; the last one makes `output`.
        source: What is normalised.
        output: The result, scale and shift included.
        gamma: Scale per channel, float32 [channels].
        beta: Shift per channel, float32 [channels], or None.
        gamma_at: Node and index of the input that holds `gamma`.
        beta_at: Node and index of the input that holds a shift or can take one; None where nothing can.
        axis: The channel axis, counted from the last (negative).
        epsilon: What is added to the variance.
        kind: "layer", "rms", "group" or "instance".
    """

    nodes: tuple[Node, ...]
    source: Value
    output: Value
    gamma: npt.NDArray[np.float32]
    beta: npt.NDArray[np.float32] | None
    gamma_at: Slot
    beta_at: Slot | None
    axis: int
    epsilon: float
    kind: Kind

    @property
    def name(self) -> str:
        """Name of the node that a report calls it by: the last one."""
        return str(self.nodes[-1].name)


@dataclass(frozen=True)
class _Deviation:
    """What is squared: x - mean(x), or x itself."""

    value: Value
    source: Value
    mean: Value | None
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class _Root:
    """sqrt(mean(d^2) + epsilon) and what it is made of."""

    deviation: _Deviation
    axis: int
    epsilon: float
    nodes: tuple[Node, ...]


def chain_at(sqrt: Node) -> Norm | str:
    """The normalisation around `sqrt`, the reason why it is none, or "" where nothing looks like one."""
    root = _root(sqrt)
    if isinstance(root, str):
        return root
    inverse, divider = _inverse(sqrt.outputs[0])
    if divider is not None:
        return _tail(root, divider, (*inverse, divider), divider.inputs[0])
    if not inverse:
        return "its root is read by something other than one division"
    reciprocal = inverse[-1].outputs[0]
    scaled = graph.only_user(reciprocal)
    if scaled is None or scaled.op_type != "Mul":
        return "its reciprocal root is read by something other than one multiplication"
    other = scaled.inputs[1] if scaled.inputs[0] is reciprocal else scaled.inputs[0]
    if graph.constant(other) is not None:
        return _multiplied_out(root, scaled, reciprocal, inverse)
    return _tail(root, scaled, (*inverse, scaled), other)


def affine_after(value: Value, axis: int, channels: int) -> Affine | None:
    """The Mul by one constant per channel that alone reads `value`, and the Add behind it; None without the Mul."""
    mul = graph.only_user(value)
    if mul is None or mul.op_type != "Mul":
        return None
    index = 1 if mul.inputs[0] is value else 0
    gamma = vector(graph.constant(mul.inputs[index]), axis, channels)
    if gamma is None:
        return None
    add = graph.only_user(mul.outputs[0])
    if add is not None and add.op_type == "Add":
        place = 1 if add.inputs[0] is mul.outputs[0] else 0
        beta = vector(graph.constant(add.inputs[place]), axis, channels)
        if beta is not None:
            return Affine((mul, add), gamma, beta, (mul, index), (add, place))
    return Affine((mul,), gamma, None, (mul, index), None)


def vector(array: npt.NDArray[np.generic] | None, axis: int, channels: int) -> Stored | None:
    """`array` as [channels] when it holds one value per index of `axis` (negative), or one for all; else None."""
    if array is None or array.dtype != np.float32:
        return None
    if array.size == 1:
        return np.full(channels, array.reshape(-1)[0], np.float32) if array.ndim <= 1 else None
    if array.size != channels or array.ndim < -axis or array.shape[axis] != channels:
        return None
    return array.reshape(-1).astype(np.float32)


def _root(sqrt: Node) -> _Root | str:
    add = graph.producer(sqrt.inputs[0], "Add")
    if add is None:
        return ""
    sides = [(graph.producer(value, "ReduceMean"), other) for value, other in (add.inputs, tuple(add.inputs)[::-1])]
    found = [(mean, graph.constant(other)) for mean, other in sides if mean is not None]
    if len(found) != 1:
        return ""
    mean, epsilon = found[0]
    square = graph.producer(mean.inputs[0], "Pow", "Mul")
    base = _squared(square) if square is not None else None
    if square is None or base is None:
        return ""
    if epsilon is None or epsilon.size != 1:
        return "its epsilon is not one constant"
    if graph.dtype_name(base) not in ("float32", None):
        return f"it works on {graph.dtype_name(base)} values"
    deviation = _deviation(base)
    axis = _reduced_axis(mean)
    if axis is None:
        return "its mean is not over one known axis, with that axis kept"
    if deviation.mean is not None:
        first = deviation.mean.producer()
        assert first is not None
        if _reduced_axis(first) != axis:
            return "its two means are over different axes"
    return _Root(deviation, axis, float(epsilon.reshape(-1)[0]), (*deviation.nodes, square, mean, add, sqrt))


def _squared(node: Node) -> Value | None:
    """What is squared: d of Pow(d, 2) or Mul(d, d)."""
    base, other = node.inputs
    if node.op_type == "Mul":
        return base if base is other else None
    power = graph.constant(other)
    return base if power is not None and power.size == 1 and float(power.reshape(-1)[0]) == 2.0 else None


def _deviation(value: Value) -> _Deviation:
    """`value` as x - mean(x) (or its negative), or as itself."""
    sub = graph.producer(value, "Sub")
    if sub is not None:
        for source, mean in (sub.inputs, tuple(sub.inputs)[::-1]):
            reduce = graph.producer(mean, "ReduceMean")
            if source is not None and reduce is not None and reduce.inputs[0] is source:
                return _Deviation(value, source, mean, (reduce, sub))
    return _Deviation(value, value, None, ())


def _reduced_axis(mean: Node) -> int | None:
    """The one axis of a ReduceMean that keeps it, counted from the last."""
    axes: list[int] | None = graph.attribute(mean, "axes", None)
    if axes is None and len(mean.inputs) > 1:
        array = graph.constant(mean.inputs[1])
        axes = None if array is None else [int(axis) for axis in array.reshape(-1)]
    if axes is None or len(axes) != 1 or graph.attribute(mean, "keepdims", 1) != 1:
        return None
    shape = mean.inputs[0].shape if mean.inputs[0] is not None else None
    if axes[0] >= 0:
        return None if shape is None else axes[0] - len(shape)
    return axes[0]


def _inverse(root: Value) -> tuple[tuple[Node, ...], Node | None]:
    """How `root` is divided by: (nodes that make 1 / root, None), or ((), the Div)."""
    user = graph.only_user(root)
    if user is None:
        return (), None
    if user.op_type == "Reciprocal":
        return (user,), None
    if user.op_type != "Div" or user.inputs[1] is not root:
        return (), None
    one = graph.constant(user.inputs[0])
    if one is not None:
        return ((user,), None) if one.size == 1 and float(one.reshape(-1)[0]) == 1.0 else ((), None)
    return (), user


def _tail(root: _Root, last: Node, nodes: tuple[Node, ...], divided: Value | None) -> Norm | str:
    """The chain whose normalised value `last` makes of `divided`."""
    deviation = root.deviation
    extra: tuple[Node, ...] = ()
    if divided is not deviation.value or _negative(deviation):
        again = _deviation(divided) if divided is not None else None
        if again is None or again.source is not deviation.source or (again.mean is None) != (deviation.mean is None):
            return "what it divides is not what it squares"
        if _negative(again) or not _same_axis(again, root.axis):
            return "what it divides is not what it squares"
        extra = again.nodes
    channels = _channels(root)
    if channels is None:
        return "the number of its channels is not known"
    affine = affine_after(last.outputs[0], root.axis, channels)
    if affine is None:
        return "it is not followed by a scale per channel"
    chain = (*root.nodes, *extra, *nodes, *affine.nodes)
    return _chain(root, chain, affine)


def _negative(deviation: _Deviation) -> bool:
    """Whether the deviation is mean(x) - x."""
    sub = deviation.value.producer()
    return deviation.mean is not None and sub is not None and sub.inputs[0] is deviation.mean


def _same_axis(deviation: _Deviation, axis: int) -> bool:
    reduce = graph.producer(deviation.mean)
    return reduce is None or _reduced_axis(reduce) == axis


def _channels(root: _Root) -> int | None:
    shape = root.deviation.source.shape
    size = shape[root.axis] if shape is not None and len(shape) >= -root.axis else None
    return size if isinstance(size, int) else None


def _multiplied_out(root: _Root, mul: Node, reciprocal: Value, inverse: tuple[Node, ...]) -> Norm | str:
    """TensorFlow's form, with m = `mul` = gamma * reciprocal."""
    channels, mean = _channels(root), root.deviation.mean
    if channels is None:
        return "the number of its channels is not known"
    index = 1 if mul.inputs[0] is reciprocal else 0
    gamma = vector(graph.constant(mul.inputs[index]), root.axis, channels)
    readers = [user for user in graph.users(mul.outputs[0]) if user.op_type == "Mul"]
    products = {user.inputs[1 if user.inputs[0] is mul.outputs[0] else 0]: user for user in readers}
    first = products.get(root.deviation.source)
    second = products.get(mean) if mean is not None else None
    if gamma is None or first is None or (mean is not None and second is None):
        return "it is not followed by a scale per channel"
    if mean is None:
        affine = Affine((mul, first), gamma, None, (mul, index), None)
        return _chain(root, (*root.nodes, *inverse, mul, first), affine)
    assert second is not None
    sub, add = graph.only_user(second.outputs[0]), graph.only_user(first.outputs[0])
    joined = sub is not None and add is not None and graph.only_user(sub.outputs[0]) is add
    if sub is None or add is None or not joined or (sub.op_type, add.op_type) != ("Sub", "Add"):
        return "its scaled input and mean do not meet in a shift"
    beta = vector(graph.constant(sub.inputs[0]), root.axis, channels)
    if beta is None:
        return "its shift is not one constant per channel"
    affine = Affine((mul, first, second, sub, add), gamma, beta, (mul, index), (sub, 0))
    return _chain(root, (*root.nodes, *inverse, *affine.nodes), affine)


def _chain(root: _Root, nodes: tuple[Node, ...], affine: Affine) -> Norm:
    last = affine.nodes[-1]
    kind: Kind = "rms" if root.deviation.mean is None else "layer"
    return Norm(
        tuple(dict.fromkeys(nodes)), root.deviation.source, last.outputs[0],
        affine.gamma, affine.beta, affine.gamma_at, affine.beta_at, root.axis, root.epsilon, kind,
    )  # fmt: skip
