"""Activation functions."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

from onnxq.torch_exec.binding import Handler
from onnxq.torch_exec.ops.unary import Unary


def leaky_relu(x: Tensor, /, *, alpha: float = 0.01) -> Tensor:
    """x, times `alpha` below 0."""
    return F.leaky_relu(x, alpha)


def prelu(x: Tensor, slope: Tensor, /) -> Tensor:
    """x, times `slope` (broadcast) below 0."""
    return torch.where(x < 0, x * slope, x)


def elu(x: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    """x, below 0 alpha (e^x - 1)."""
    return F.elu(x, alpha)


def selu(x: Tensor, /, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    """Gamma times `elu`."""
    return gamma * F.elu(x, alpha)


def celu(x: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    """x, below 0 alpha (e^(x / alpha) - 1)."""
    return F.celu(x, alpha)


def hard_sigmoid(x: Tensor, /, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    """Alpha x + beta, kept in [0, 1]."""
    return torch.clamp(alpha * x + beta, 0, 1)


def hard_swish(x: Tensor, /) -> Tensor:
    """X times the hard sigmoid of slope 1/6."""
    return F.hardswish(x)


def swish(x: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    """X sigmoid(alpha x)."""
    return x * torch.sigmoid(alpha * x)


def softplus(x: Tensor, /) -> Tensor:
    """log(1 + e^x), without overflow."""
    return torch.logaddexp(x, torch.zeros_like(x))


def thresholded_relu(x: Tensor, /, *, alpha: float = 1.0) -> Tensor:
    """X above `alpha`, else 0."""
    return torch.where(x > alpha, x, torch.zeros_like(x))


def shrink(x: Tensor, /, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    """X - bias above `lambd`, x + bias below -lambd, 0 between."""
    inner = torch.where(x < -lambd, x + bias, torch.zeros_like(x))
    return torch.where(x > lambd, x - bias, inner).to(x.dtype)


def gelu(x: Tensor, /, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """X times the normal distribution function of x, or its approximation by tanh."""
    return F.gelu(x, approximate=approximate)


def softmax(x: Tensor, /, *, axis: int = -1) -> Tensor:
    """e^x over its sum along `axis`."""
    return torch.softmax(x, axis)


def log_softmax(x: Tensor, /, *, axis: int = -1) -> Tensor:
    """Logarithm of `softmax`."""
    return torch.log_softmax(x, axis)


def hardmax(x: Tensor, /, *, axis: int = -1) -> Tensor:
    """1 at the first maximum along `axis`, else 0."""
    first = torch.argmax(x, axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, first, 1)


OPS: dict[str, Handler] = {
    "Celu": celu,
    "Elu": elu,
    "Gelu": gelu,
    "HardSigmoid": hard_sigmoid,
    "HardSwish": hard_swish,
    "Hardmax": hardmax,
    "LeakyRelu": leaky_relu,
    "LogSoftmax": log_softmax,
    "Mish": Unary(F.mish),
    "PRelu": prelu,
    "Relu": Unary(torch.relu),
    "Selu": selu,
    "Shrink": shrink,
    "Sigmoid": Unary(torch.sigmoid),
    "Softmax": softmax,
    "Softplus": softplus,
    "Softsign": Unary(F.softsign),
    "Swish": swish,
    "ThresholdedRelu": thresholded_relu,
}
