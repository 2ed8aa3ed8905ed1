"""Reading elements by their indices."""

from __future__ import annotations

import torch
from torch import Tensor

from onnxq.torch_exec.binding import Handler


def counted(indices: Tensor, size: int) -> Tensor:
    """`indices` as int64, those below 0 counted from the end of `size`."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


def gather(data: Tensor, indices: Tensor, /, *, axis: int = 0) -> Tensor:
    """Slices of `data` along `axis`; the axes of `indices` take the place of that axis."""
    axis %= data.ndim
    taken = data.index_select(axis, counted(indices, data.shape[axis]).flatten())
    return taken.reshape((*data.shape[:axis], *indices.shape, *data.shape[axis + 1 :]))


def gather_elements(data: Tensor, indices: Tensor, /, *, axis: int = 0) -> Tensor:
    """For each element of `indices` the one of `data` at the same place, but for that index along `axis`."""
    return torch.gather(data, axis, counted(indices, data.shape[axis]))


def gather_nd(data: Tensor, indices: Tensor, /, *, batch_dims: int = 0) -> Tensor:
    """Slices of `data` at the index vectors on the last axis of `indices`, behind `batch_dims` shared axes."""
    shared = data.shape[:batch_dims]
    rows = data.reshape(-1, *data.shape[batch_dims:])
    vectors = indices.reshape(rows.shape[0], -1, indices.shape[-1])
    places = [counted(vectors[..., axis], rows.shape[axis + 1]) for axis in range(indices.shape[-1])]
    batch = torch.arange(rows.shape[0], device=data.device).unsqueeze(-1).expand(vectors.shape[:2])
    taken = rows[(batch, *places)]
    return taken.reshape((*shared, *indices.shape[batch_dims:-1], *data.shape[batch_dims + indices.shape[-1] :]))


def compress(data: Tensor, condition: Tensor, /, *, axis: int | None = None) -> Tensor:
    """The slices along `axis` (or the elements of the flat tensor) where `condition` holds."""
    if axis is None:
        data, axis = data.flatten(), 0
    return data.index_select(axis, torch.nonzero(condition).flatten())


def one_hot(indices: Tensor, depth: list[int], values: Tensor, /, *, axis: int = -1) -> Tensor:
    """A new axis of size `depth` at `axis`: values[1] at the index, values[0] elsewhere and for indices outside."""
    wanted = indices.to(torch.int64)
    wanted = torch.where(wanted < 0, wanted + int(depth[0]), wanted).unsqueeze(axis)
    shape = [1] * wanted.ndim
    shape[axis] = int(depth[0])
    hit = wanted == torch.arange(int(depth[0]), device=indices.device).reshape(shape)
    return torch.where(hit, values[1], values[0])


def non_zero(x: Tensor, /) -> Tensor:
    """Indices of the elements that are not 0, int64 [axes, count]."""
    return torch.nonzero(x).T


def trilu(x: Tensor, /, k: int = 0, *, upper: int = 1) -> Tensor:
    """The upper (or lower) triangle of each matrix from its k-th diagonal on."""
    return torch.triu(x, k) if upper else torch.tril(x, k)


def reverse_sequence(x: Tensor, lengths: Tensor, /, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first lengths[b] steps of each sequence b in reverse order, the others as they are."""
    steps = torch.arange(x.shape[time_axis], device=x.device).unsqueeze(0)
    ends = lengths.unsqueeze(1)
    places = torch.where(steps < ends, ends - 1 - steps, steps)
    shape = [1] * x.ndim
    shape[batch_axis], shape[time_axis] = x.shape[batch_axis], x.shape[time_axis]
    if batch_axis > time_axis:
        places = places.T
    return torch.gather(x, time_axis, places.reshape(shape).expand(x.shape))


OPS: dict[str, Handler] = {
    "Compress": compress,
    "Gather": gather,
    "GatherElements": gather_elements,
    "GatherND": gather_nd,
    "NonZero": non_zero,
    "OneHot": one_hot,
    "ReverseSequence": reverse_sequence,
    "Trilu": trilu,
}
