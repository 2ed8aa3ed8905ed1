"""Comparisons, truth values and bits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from onnxq.torch_exec.binding import Handler
from onnxq.torch_exec.ops.arithmetic import Binary


def bit_shift(a: Tensor, b: Tensor, /, *, direction: Literal["LEFT", "RIGHT"]) -> Tensor:
    """The bits of `a` moved by `b` places; zeros move in."""
    return torch.bitwise_left_shift(a, b) if direction == "LEFT" else torch.bitwise_right_shift(a, b)


def where(condition: Tensor, a: Tensor, b: Tensor, /) -> Tensor:
    """`a` where `condition` holds, elsewhere `b`, broadcast."""
    return torch.where(condition, a, b)


OPS: dict[str, Handler] = {
    "And": Binary(torch.logical_and),
    "BitShift": bit_shift,
    "BitwiseAnd": Binary(torch.bitwise_and),
    "BitwiseOr": Binary(torch.bitwise_or),
    "BitwiseXor": Binary(torch.bitwise_xor),
    "Equal": Binary(torch.eq),
    "Greater": Binary(torch.gt),
    "GreaterOrEqual": Binary(torch.ge),
    "Less": Binary(torch.lt),
    "LessOrEqual": Binary(torch.le),
    "Or": Binary(torch.logical_or),
    "Where": where,
    "Xor": Binary(torch.logical_xor),
}
