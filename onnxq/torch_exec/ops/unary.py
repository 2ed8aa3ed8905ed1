"""Functions of one number, applied to every element."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onnxq.torch_exec.binding import Handler


@dataclass(frozen=True)
class Unary:
    """An operator without attributes that is one function of torch."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, x: Tensor, /) -> Tensor:
        """`function` of every element."""
        return self.function(x)


def is_inf(x: Tensor, /, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Where `x` is one of the infinities asked for."""
    found = torch.zeros_like(x, dtype=torch.bool)
    if detect_negative:
        found = found | (x == -torch.inf)
    if detect_positive:
        found = found | (x == torch.inf)
    return found


def identity(x: Tensor, /) -> Tensor:
    """`x` itself."""
    return x


def dropout(
    data: Tensor,
    /,
    ratio: float = 0.5,
    training_mode: Literal[False] = False,
    *,
    seed: int = 0,
    num_outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Inference: `data` as it is, and a mask that keeps everything. `ratio` and `seed` matter in training only."""
    del ratio, training_mode, seed
    return (data, torch.ones_like(data, dtype=torch.bool))[:num_outputs]


def bit_cast(x: Tensor, /, *, to: torch.dtype) -> Tensor:
    """The bits of `x` read as another type of the same width."""
    return x.view(to)


def cast(
    x: Tensor, /, *, to: torch.dtype, saturate: int = 1, round_mode: Literal["up", "down", "nearest"] = "up"
) -> Tensor:
    """Another element type; floats lose their fraction. `saturate` and `round_mode` concern 8-bit floats only."""
    del saturate, round_mode
    return x.to(to)


def cast_like(
    x: Tensor, like: Tensor, /, *, saturate: int = 1, round_mode: Literal["up", "down", "nearest"] = "up"
) -> Tensor:
    """The element type of `like`."""
    return cast(x, to=like.dtype, saturate=saturate, round_mode=round_mode)


OPS: dict[str, Handler] = {
    "Abs": Unary(torch.abs),
    "Acos": Unary(torch.acos),
    "Acosh": Unary(torch.acosh),
    "Asin": Unary(torch.asin),
    "Asinh": Unary(torch.asinh),
    "Atan": Unary(torch.atan),
    "Atanh": Unary(torch.atanh),
    "BitCast": bit_cast,
    "BitwiseNot": Unary(torch.bitwise_not),
    "Cast": cast,
    "CastLike": cast_like,
    "Ceil": Unary(torch.ceil),
    "Cos": Unary(torch.cos),
    "Cosh": Unary(torch.cosh),
    "Det": Unary(torch.linalg.det),
    "Dropout": dropout,
    "Erf": Unary(torch.erf),
    "Exp": Unary(torch.exp),
    "Floor": Unary(torch.floor),
    "Identity": identity,
    "IsInf": is_inf,
    "IsNaN": Unary(torch.isnan),
    "Log": Unary(torch.log),
    "Neg": Unary(torch.neg),
    "Not": Unary(torch.logical_not),
    "Reciprocal": Unary(torch.reciprocal),
    "Round": Unary(torch.round),
    "Sign": Unary(torch.sign),
    "Sin": Unary(torch.sin),
    "Sinh": Unary(torch.sinh),
    "Sqrt": Unary(torch.sqrt),
    "Tan": Unary(torch.tan),
    "Tanh": Unary(torch.tanh),
}
