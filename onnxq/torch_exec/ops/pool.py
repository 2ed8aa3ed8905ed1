"""Pools: the largest, the mean or the norm of each window."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

from onnxq.torch_exec.binding import Handler
from onnxq.torch_exec.ops.windows import AutoPad, covered, for_torch, paddings

_MAX = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_MEAN = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True)
class Windows:
    """The windows of a pool.

    Attributes:
        kernel: Taps per axis.
        strides: Steps between windows.
        dilations: Steps between taps.
        pads: (before, behind) of what counts as padding.
        reach: (before, behind) such that the windows tile the padded axis exactly; differs from `pads` behind, where
            the last window may end early or, with ceil_mode, late.
    """

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    pads: list[tuple[int, int]]
    reach: list[tuple[int, int]]


def _windows(
    sizes: Sequence[int],
    kernel: list[int],
    strides: list[int] | None,
    dilations: list[int] | None,
    pads: list[int] | None,
    auto_pad: AutoPad,
    ceil_mode: int,
) -> Windows:
    """Lay out the windows; one that would start behind the data and its left padding is dropped."""
    axes = len(kernel)
    strides, dilations = strides or [1] * axes, dilations or [1] * axes
    around = paddings(list(sizes), kernel, strides, dilations, pads, auto_pad)
    reach = []
    for size, taps, stride, dilation, (before, behind) in zip(sizes, kernel, strides, dilations, around, strict=True):
        room, window = size + before + behind, covered(taps, dilation)
        count = (room - window) // stride + 1
        if ceil_mode and auto_pad in ("NOTSET", "VALID"):
            count = math.ceil((room - window) / stride) + 1
            count -= (count - 1) * stride >= size + before
        reach.append((before, (count - 1) * stride + window - size - before))
    return Windows(kernel, strides, dilations, around, reach)


def max_pool(
    x: Tensor,
    /,
    *,
    kernel_shape: list[int],
    auto_pad: AutoPad = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    storage_order: int = 0,
    strides: list[int] | None = None,
    num_outputs: int = 1,
) -> tuple[Tensor, ...]:
    """The largest value of each window and its flat index in all of `x` (int64; `storage_order` 1: column first)."""
    sizes = x.shape[2:]
    windows = _windows(sizes, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    floats = x if x.is_floating_point() else x.float()
    padded = F.pad(floats, for_torch(windows.reach), value=-torch.inf)
    pool = _MAX[len(kernel_shape)]
    if num_outputs == 1:
        return (pool(padded, kernel_shape, windows.strides, 0, windows.dilations).to(x.dtype),)
    largest, places = pool(padded, kernel_shape, windows.strides, 0, windows.dilations, return_indices=True)
    plane = torch.arange(math.prod(sizes), device=x.device).reshape(tuple(sizes))
    if storage_order:
        plane = (
            torch.arange(math.prod(sizes), device=x.device)
            .reshape(tuple(reversed(sizes)))
            .permute(*range(len(sizes) - 1, -1, -1))
        )
    flat = F.pad(plane, for_torch(windows.reach)).flatten()[places]
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1], *[1] * len(sizes))
    return largest.to(x.dtype), flat + planes * math.prod(sizes)


def _sums(x: Tensor, windows: Windows) -> Tensor:
    """The sum of each window; padding counts as 0."""
    axes = len(windows.kernel)
    padded = F.pad(x, for_torch(windows.reach))
    if all(dilation == 1 for dilation in windows.dilations):
        mean: Tensor = _MEAN[axes](padded, windows.kernel, windows.strides)
        return mean * math.prod(windows.kernel)
    single = padded.reshape(-1, 1, *padded.shape[2:])
    ones = torch.ones(1, 1, *windows.kernel, dtype=x.dtype, device=x.device)
    sums: Tensor = _CONV[axes](single, ones, None, windows.strides, 0, windows.dilations)
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


def _counts(like: Tensor, sizes: Sequence[int], windows: Windows, *, include_pads: bool) -> Tensor:
    """How many places of each window count, shape [windows per axis]."""
    total = torch.ones((), dtype=like.dtype, device=like.device)
    for axis, size in enumerate(sizes):
        (before, behind), (_, reach) = windows.pads[axis], windows.reach[axis]
        first, last = (0, before + size + behind) if include_pads else (before, before + size)
        starts = range(before + size + reach - covered(windows.kernel[axis], windows.dilations[axis]) + 1)
        taps = [step * windows.dilations[axis] for step in range(windows.kernel[axis])]
        counts = [sum(first <= start + tap < last for tap in taps) for start in starts[:: windows.strides[axis]]]
        total = total.unsqueeze(-1) * torch.tensor(counts, dtype=like.dtype, device=like.device)
    return total


def average_pool(
    x: Tensor,
    /,
    *,
    kernel_shape: list[int],
    auto_pad: AutoPad = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """The mean of each window, over its places in `x` or, with `count_include_pad`, also those in the pads."""
    sizes = x.shape[2:]
    windows = _windows(sizes, kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    return _sums(x, windows) / _counts(x, sizes, windows, include_pads=bool(count_include_pad))


def lp_pool(
    x: Tensor,
    /,
    *,
    kernel_shape: list[int],
    auto_pad: AutoPad = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    p: int = 2,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """(sum of |x|^p)^(1/p) of each window."""
    windows = _windows(x.shape[2:], kernel_shape, strides, dilations, pads, auto_pad, ceil_mode)
    return _sums(x.abs().pow(p), windows).pow(1 / p)


def _spatial(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.ndim))


def global_average_pool(x: Tensor, /) -> Tensor:
    """The mean of each channel."""
    return x.mean(_spatial(x), keepdim=True)


def global_max_pool(x: Tensor, /) -> Tensor:
    """The largest value of each channel."""
    return x.amax(_spatial(x), keepdim=True)


def global_lp_pool(x: Tensor, /, *, p: int = 2) -> Tensor:
    """(sum of |x|^p)^(1/p) of each channel."""
    return x.abs().pow(p).sum(_spatial(x), keepdim=True).pow(1 / p)


OPS: dict[str, Handler] = {
    "AveragePool": average_pool,
    "GlobalAveragePool": global_average_pool,
    "GlobalLpPool": global_lp_pool,
    "GlobalMaxPool": global_max_pool,
    "LpPool": lp_pool,
    "MaxPool": max_pool,
}
