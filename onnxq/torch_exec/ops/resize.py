"""Resize: each output value is a weighted sum of neighbours, one axis after the other.

Along an axis, output index o lies at the coordinate x(o) of the input; with n = floor(x) and r = x - n it becomes the
sum of w_k(r) * input[n + k] over the taps k. The kernels are the triangle max(0, 1 - |d|) and the cubic of Keys (1981)

    |d| <= 1:  (a + 2)|d|^3 - (a + 3)|d|^2 + 1          1 < |d| < 2:  a|d|^3 - 5a|d|^2 + 8a|d| - 4a

stretched by 1 / scale against aliasing where the axis shrinks. Coordinates are float32, as in the runtimes, for the
choice of the nearest neighbour hangs on their rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onnxq.torch_exec.binding import Handler

Transform = Literal[
    "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel", "align_corners", "asymmetric", "tf_crop_and_resize"
]
Rounding = Literal["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


@dataclass(frozen=True)
class Axis:
    """How one axis is resized.

    Attributes:
        index: Which axis.
        size: Its length before.
        target: Its length after.
        scale: target / size before rounding.
        region: First and last place that are read, as fractions of the length (tf_crop_and_resize).
    """

    index: int
    size: int
    target: int
    scale: float
    region: tuple[float, float]


@dataclass(frozen=True)
class Kernel:
    """The weights of neighbours.

    Attributes:
        cubic: The cubic kernel, or the triangle.
        a: Its coefficient.
        antialias: Stretch it where an axis shrinks.
        exclude_outside: Neighbours outside the axis weigh nothing; else they repeat the outermost value.
    """

    cubic: bool
    a: float
    antialias: bool
    exclude_outside: bool

    def taps(self, axis: Axis, places: Tensor) -> tuple[Tensor, Tensor]:
        """Indices and weights of the neighbours of each of `places`, both [places, taps]."""
        shrink = min(axis.scale, 1.0) if self.antialias else 1.0
        first = math.floor(-(2 if self.cubic else 1) / shrink) + 1
        steps = torch.arange(first, 2 - first, dtype=torch.float64)
        base = places.floor().double().unsqueeze(1)
        weights = self._weight(((base + steps - places.double().unsqueeze(1)) * shrink).abs())
        indices = base + steps
        if self.exclude_outside:
            weights = torch.where((indices < 0) | (indices >= axis.size), 0.0, weights)
        weights = weights / weights.sum(1, keepdim=True)
        return indices.clamp(0, axis.size - 1).to(torch.int64), weights

    def _weight(self, distance: Tensor) -> Tensor:
        if not self.cubic:
            return (1 - distance).clamp(min=0)
        a, d = self.a, distance
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        return torch.where(d <= 1, near, torch.where(d < 2, far, 0.0))


def resize(
    x: Tensor,
    roi: list[float] | None = None,
    scales: list[float] | None = None,
    sizes: list[int] | None = None,
    /,
    *,
    antialias: int = 0,
    axes: list[int] | None = None,
    coordinate_transformation_mode: Transform = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: Literal["stretch", "not_larger", "not_smaller"] = "stretch",
    mode: Literal["nearest", "linear", "cubic"] = "nearest",
    nearest_mode: Rounding = "round_prefer_floor",
) -> Tensor:
    """Resize the axes named (by default all) by `scales` or to `sizes`."""
    named = [axis % x.ndim for axis in axes] if axes is not None else list(range(x.ndim))
    kernel = Kernel(mode == "cubic", cubic_coeff_a, bool(antialias), bool(exclude_outside))
    made = x
    for axis in _layout(x, named, roi or [], scales or [], sizes or [], keep_aspect_ratio_policy):
        crops = coordinate_transformation_mode == "tf_crop_and_resize"
        if axis.size == axis.target and axis.scale == 1 and not crops:
            continue
        places = _places(axis, coordinate_transformation_mode)
        if mode == "nearest":
            nearest = _nearest(places, nearest_mode).clamp(0, axis.size - 1).to(torch.int64)
            made = made.index_select(axis.index, nearest.to(x.device))
        else:
            made = _blend(made, axis.index, *kernel.taps(axis, places))
        if crops:
            outside = ((places < 0) | (places > axis.size - 1)).to(x.device)
            shape = [-1 if index == axis.index else 1 for index in range(x.ndim)]
            made = made.masked_fill(outside.reshape(shape), extrapolation_value)
    return made


def _layout(
    x: Tensor, named: list[int], roi: list[float], scales: list[float], sizes: list[int], policy: str
) -> list[Axis]:
    lengths = [x.shape[axis] for axis in named]
    if scales:
        targets = [int(torch.tensor(scale) * length) for scale, length in zip(scales, lengths, strict=True)]
    else:
        scales = [target / length for target, length in zip(sizes, lengths, strict=True)]
        targets = sizes
        if policy != "stretch":
            scales = [min(scales) if policy == "not_larger" else max(scales)] * len(scales)
            targets = [math.floor(scale * length + 0.5) for scale, length in zip(scales, lengths, strict=True)]
    starts, ends = (roi[: len(named)], roi[len(named) :]) if roi else ([0.0] * len(named), [1.0] * len(named))
    regions = list(zip(starts, ends, strict=True))
    return [Axis(*entry) for entry in zip(named, lengths, targets, scales, regions, strict=True)]


def _places(axis: Axis, transform: str) -> Tensor:
    """Where each output index lies in the input, float32 [target]."""
    index = torch.arange(axis.target, dtype=torch.float32)
    if transform == "asymmetric":
        return index / axis.scale
    if transform == "align_corners":
        return index * (axis.size - 1) / (axis.target - 1) if axis.target > 1 else index * 0
    if transform == "tf_crop_and_resize":
        region = torch.tensor(axis.region, dtype=torch.float32)
        start, end = region[0], region[1]
        if axis.target > 1:
            return start * (axis.size - 1) + index * (end - start) * (axis.size - 1) / (axis.target - 1)
        return index + 0.5 * (start + end) * (axis.size - 1)
    if transform == "pytorch_half_pixel" and axis.target <= 1:
        return index * 0
    half = (index + 0.5) / axis.scale - 0.5
    if transform == "half_pixel_symmetric":
        return half + axis.size / 2 * (1 - axis.target / (axis.scale * axis.size))
    return half


def _nearest(places: Tensor, rounding: str) -> Tensor:
    if rounding == "floor":
        return places.floor()
    if rounding == "ceil":
        return places.ceil()
    return (places - 0.5).ceil() if rounding == "round_prefer_floor" else (places + 0.5).floor()


def _blend(x: Tensor, axis: int, indices: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of `x` at `indices` along `axis`."""
    shape = [-1 if index == axis else 1 for index in range(x.ndim)]
    indices, weights = indices.to(x.device), weights.to(x.device, x.dtype)
    total = torch.zeros((), dtype=x.dtype, device=x.device)
    for tap in range(indices.shape[1]):
        total = total + x.index_select(axis, indices[:, tap]) * weights[:, tap].reshape(shape)
    return total


OPS: dict[str, Handler] = {"Resize": resize}
