"""Functions of two or more numbers, with numpy's broadcasting."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxq.torch_exec.binding import Handler


@dataclass(frozen=True)
class Binary:
    """An operator of two inputs without attributes that is one function of torch."""

    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, a: Tensor, b: Tensor, /) -> Tensor:
        """`function` of the elements, broadcast."""
        return self.function(a, b)


@dataclass(frozen=True)
class Variadic:
    """An operator of any number of inputs that joins them two by two."""

    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, *inputs: Tensor) -> Tensor:
        """`function` of the first two, then of that and the third, and so on."""
        return functools.reduce(self.function, inputs)


def divide(a: Tensor, b: Tensor, /) -> Tensor:
    """A / b; integers round toward zero."""
    return torch.true_divide(a, b) if a.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


def power(x: Tensor, y: Tensor, /) -> Tensor:
    """X ** y in the element type of `x`."""
    return torch.pow(x, y).to(x.dtype)


def modulo(a: Tensor, b: Tensor, /, *, fmod: int = 0) -> Tensor:
    """The remainder: of the sign of `b`, or of `a` as in C with `fmod`."""
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def mean(*inputs: Tensor) -> Tensor:
    """The mean of all inputs, broadcast."""
    return functools.reduce(torch.add, inputs) / len(inputs)


def clip(x: Tensor, /, min: Tensor | None = None, max: Tensor | None = None) -> Tensor:
    """min(max(x, min), max). At a bound the gradient is that of x."""
    low = None if min is None else min.to(x.dtype).reshape(())
    high = None if max is None else max.to(x.dtype).reshape(())
    return x if low is None and high is None else torch.clamp(x, low, high)


OPS: dict[str, Handler] = {
    "Add": Binary(torch.add),
    "Clip": clip,
    "Div": divide,
    "Max": Variadic(torch.maximum),
    "Mean": mean,
    "Min": Variadic(torch.minimum),
    "Mod": modulo,
    "Mul": Binary(torch.mul),
    "Pow": power,
    "Sub": Binary(torch.sub),
    "Sum": Variadic(torch.add),
}
