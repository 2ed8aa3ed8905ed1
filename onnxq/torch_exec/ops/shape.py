"""Shapes: reading them, changing them, joining and cutting tensors."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

from onnxq.torch_exec.binding import Handler


def shape(data: Tensor, /, *, start: int = 0, end: int | None = None) -> Tensor:
    """Sizes of the axes from `start` up to `end`, int64."""
    return torch.tensor(list(data.shape)[start:end], dtype=torch.int64, device=data.device)


def size(data: Tensor, /) -> Tensor:
    """Number of elements, int64 scalar."""
    return torch.tensor(data.numel(), dtype=torch.int64, device=data.device)


def reshape(data: Tensor, shape: list[int], /, *, allowzero: int = 0) -> Tensor:
    """Other axes; a size of 0 keeps the old size (unless `allowzero`), one of -1 takes what is left."""
    sizes = [data.shape[axis] if wanted == 0 and not allowzero else wanted for axis, wanted in enumerate(shape)]
    return data.reshape(sizes)


def flatten(data: Tensor, /, *, axis: int = 1) -> Tensor:
    """A matrix: the axes before `axis`, and the others."""
    axis += data.ndim if axis < 0 else 0
    return data.reshape(math.prod(data.shape[:axis]), math.prod(data.shape[axis:]))


def squeeze(data: Tensor, /, axes: list[int] | None = None) -> Tensor:
    """Drop the axes named, or all of size 1."""
    return data.squeeze() if axes is None else data.squeeze(tuple(axes)) if axes else data


def unsqueeze(data: Tensor, /, axes: list[int]) -> Tensor:
    """New axes of size 1; `axes` counts in the result."""
    for axis in sorted(axis % (data.ndim + len(axes)) for axis in axes):
        data = data.unsqueeze(axis)
    return data


def transpose(data: Tensor, /, *, perm: list[int] | None = None) -> Tensor:
    """The axes in the order `perm`, by default reversed."""
    return data.permute(perm if perm is not None else list(reversed(range(data.ndim))))


def expand(data: Tensor, shape: list[int], /) -> Tensor:
    """Broadcast `data` with `shape`; a size of 1 there keeps that of `data`."""
    rank = max(data.ndim, len(shape))
    have = [1] * (rank - data.ndim) + list(data.shape)
    wanted = [1] * (rank - len(shape)) + shape
    return data.expand([old if new == 1 else new for old, new in zip(have, wanted, strict=True)])


def tile(data: Tensor, repeats: list[int], /) -> Tensor:
    """`data` repeated along each axis."""
    return data.repeat(repeats) if repeats else data


def concat(*inputs: Tensor, axis: int) -> Tensor:
    """The inputs, one behind the other along `axis`."""
    return torch.cat(inputs, axis)


def split(data: Tensor, /, split: list[int] | None = None, *, axis: int = 0, num_outputs: int) -> tuple[Tensor, ...]:
    """Parts of the sizes `split`, or `num_outputs` equal ones, the last of which may be smaller."""
    length = data.shape[axis]
    if split is None:
        part = -(-length // num_outputs)
        split = [part] * (num_outputs - 1)
        split.append(length - sum(split))
    return torch.split(data, split, axis)


def slice_(
    data: Tensor,
    /,
    starts: list[int],
    ends: list[int],
    axes: list[int] | None = None,
    steps: list[int] | None = None,
) -> Tensor:
    """Python's data[start:end:step] along each of `axes` (by default the first ones), steps below 0 included."""
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = axes[index] if axes is not None else index
        taken = range(data.shape[axis])[start : end : steps[index] if steps is not None else 1]
        if taken.step < 0:
            data = data.index_select(axis, torch.tensor(taken, dtype=torch.int64, device=data.device))
        else:
            part = data.narrow(axis, taken.start, max(min(taken.stop, data.shape[axis]) - taken.start, 0))
            data = part if taken.step == 1 else _every(part, axis, taken.step)
    return data


def _every(data: Tensor, axis: int, step: int) -> Tensor:
    index = [slice(None)] * data.ndim
    index[axis] = slice(None, None, step)
    return data[tuple(index)]


def pad(
    data: Tensor,
    pads: list[int],
    value: Tensor | None = None,
    axes: list[int] | None = None,
    /,
    *,
    mode: Literal["constant", "reflect", "edge", "wrap"] = "constant",
) -> Tensor:
    """Widen (or, below 0, crop) the axes named: by `value`, the mirrored or repeated inside, or the outermost value."""
    around = dict.fromkeys(range(data.ndim), (0, 0))
    named = [axis % data.ndim for axis in axes] if axes is not None else list(range(data.ndim))
    around.update(zip(named, zip(pads[: len(named)], pads[len(named) :], strict=True), strict=True))
    if mode == "constant":
        return _pad_constant(data, around, value)
    for axis, (before, behind) in around.items():
        if before or behind:
            places = [_place(place, data.shape[axis], mode) for place in range(-before, data.shape[axis] + behind)]
            data = data.index_select(axis, torch.tensor(places, dtype=torch.int64, device=data.device))
    return data


def _pad_constant(data: Tensor, around: dict[int, tuple[int, int]], value: Tensor | None) -> Tensor:
    widths = [width for axis in reversed(range(data.ndim)) for width in around[axis]]
    if value is None:
        return F.pad(data, widths)
    if data.dtype is torch.bool:
        return F.pad(data.to(torch.uint8), widths, value=float(value.item())).bool()
    return F.pad(data, widths, value=value.item())


def _place(place: int, size: int, mode: str) -> int:
    """Where the value at `place`, which may lie outside 0..size - 1, is taken from."""
    if mode == "edge":
        return min(max(place, 0), size - 1)
    if mode == "wrap":
        return place % size
    period = max(2 * (size - 1), 1)
    place %= period
    return place if place < size else period - place


def depth_to_space(data: Tensor, /, *, blocksize: int, mode: Literal["DCR", "CRD"] = "DCR") -> Tensor:
    """[batch, c b^2, h, w] to [batch, c, h b, w b]; the block is the outer (DCR) or inner (CRD) part of the depth."""
    batch, depth, height, width = data.shape
    b, channels = blocksize, depth // blocksize**2
    if mode == "DCR":
        parts = data.reshape(batch, b, b, channels, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = data.reshape(batch, channels, b, b, height, width).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(batch, channels, height * b, width * b)


def space_to_depth(data: Tensor, /, *, blocksize: int, mode: Literal["DCR", "CRD"] = "DCR") -> Tensor:
    """[batch, c, h b, w b] to [batch, b^2 c, h, w]: the inverse of `depth_to_space`."""
    batch, channels, height, width = data.shape
    b = blocksize
    parts = data.reshape(batch, channels, height // b, b, width // b, b)
    parts = parts.permute((0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4))
    return parts.reshape(batch, channels * b * b, height // b, width // b)


OPS: dict[str, Handler] = {
    "Concat": concat,
    "DepthToSpace": depth_to_space,
    "Expand": expand,
    "Flatten": flatten,
    "Pad": pad,
    "Reshape": reshape,
    "Shape": shape,
    "Size": size,
    "Slice": slice_,
    "SpaceToDepth": space_to_depth,
    "Split": split,
    "Squeeze": squeeze,
    "Tile": tile,
    "Transpose": transpose,
    "Unsqueeze": unsqueeze,
}
