"""Writing elements by their indices, into a copy."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from onnxq.torch_exec.binding import Handler
from onnxq.torch_exec.ops.index import counted

Join = Literal["none", "add", "mul", "max", "min"]
_TORCH = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, /, *, axis: int = 0, reduction: Join = "none"
) -> Tensor:
    """`data`, with `updates` at the places that `gather_elements` would read, or joined with what is there."""
    places = counted(indices, data.shape[axis])
    if reduction == "none":
        return data.scatter(axis, places, updates)
    return data.scatter_reduce(axis, places, updates, _TORCH[reduction])


def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, /, *, reduction: Join = "none") -> Tensor:
    """`data`, with slices of `updates` at the index vectors on the last axis of `indices`, or joined with them."""
    depth = indices.shape[-1]
    inner = math.prod(data.shape[depth:])
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=data.device)
    for axis in range(depth):
        flat = flat * data.shape[axis] + counted(indices[..., axis], data.shape[axis])
    places = flat.reshape(-1, 1).expand(-1, inner)
    made = scatter_elements(data.reshape(-1, inner), places, updates.reshape(-1, inner), reduction=reduction)
    return made.reshape(data.shape)


def tensor_scatter(
    past: Tensor,
    update: Tensor,
    write_indices: Tensor | None = None,
    /,
    *,
    axis: int = -2,
    mode: Literal["linear", "circular"] = "linear",
) -> Tensor:
    """`past`, with `update` written along `axis` from write_indices[batch] (by default 0) on, past the end again at 0.

    `mode` only says whether it may run past the end.
    """
    del mode
    axis %= past.ndim
    first = torch.zeros(past.shape[0], dtype=torch.int64) if write_indices is None else write_indices
    steps = torch.arange(update.shape[axis], device=past.device).unsqueeze(0)
    places = (first.to(past.device).unsqueeze(1) + steps) % past.shape[axis]
    shape = [1] * past.ndim
    shape[0], shape[axis] = places.shape
    return past.scatter(axis, places.reshape(shape).expand(update.shape), update)


OPS: dict[str, Handler] = {
    "ScatterElements": scatter_elements,
    "ScatterND": scatter_nd,
    "TensorScatter": tensor_scatter,
}
