"""Tensors out of little or nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxq.torch_exec.binding import Handler


def constant_value(
    *,
    value: Tensor | None = None,
    value_float: float | None = None,
    value_floats: list[float] | None = None,
    value_int: int | None = None,
    value_ints: list[int] | None = None,
) -> Tensor:
    """The one that is given: float32 or int64 unless it is a tensor."""
    if value is not None:
        return value
    floats = value_float if value_float is not None else value_floats
    if floats is not None:
        return torch.tensor(floats, dtype=torch.float32)
    return torch.tensor(value_int if value_int is not None else value_ints, dtype=torch.int64)


def constant_of_shape(shape: Tensor, /, *, value: Tensor | None = None) -> Tensor:
    """A tensor of the sizes `shape`, all `value` (by default the float 0)."""
    sizes = shape.tolist()
    if value is None:
        return torch.zeros(sizes, device=shape.device)
    return torch.full(sizes, value.item(), dtype=value.dtype, device=shape.device)


def range_(start: Tensor, limit: Tensor, delta: Tensor, /) -> Tensor:
    """start, start + delta, ... up to but without `limit`, in their element type."""
    first, last, step = start.item(), limit.item(), delta.item()
    count = max(-int(-(last - first) // step), 0)
    return (torch.arange(count, device=start.device) * delta + start).to(start.dtype)


def eye_like(x: Tensor, /, *, dtype: torch.dtype | None = None, k: int = 0) -> Tensor:
    """1 on the k-th diagonal of a matrix shaped like `x`, else 0."""
    rows, columns = (torch.arange(count, device=x.device) for count in x.shape)
    return (columns.unsqueeze(0) - rows.unsqueeze(1) == k).to(dtype or x.dtype)


OPS: dict[str, Handler] = {
    "Constant": constant_value,
    "ConstantOfShape": constant_of_shape,
    "EyeLike": eye_like,
    "Range": range_,
}
