"""Reductions along axes, running sums, and the places of extremes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from onnxq.torch_exec.binding import Handler


@dataclass(frozen=True)
class Reduction:
    """An operator Reduce*: `function(data, axes, keepdim)`, the axes counted from 0."""

    function: Callable[[Tensor, tuple[int, ...], bool], Tensor]

    def __call__(
        self, data: Tensor, /, axes: list[int] | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
    ) -> Tensor:
        """Reduce along `axes`; without any along all, or, with `noop_with_empty_axes`, along none."""
        if not axes:
            axes = [] if noop_with_empty_axes else list(range(data.ndim))
        if not axes:
            return self.function(data.unsqueeze(-1), (data.ndim,), False)
        return self.function(data, tuple(axis % data.ndim for axis in axes), bool(keepdims))


def _total(data: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    return data.sum(axes, keepdim=keepdim, dtype=data.dtype)


def _mean(data: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    if data.is_floating_point():
        return data.mean(axes, keepdim=keepdim)
    count = data.numel() // max(_total(torch.ones_like(data), axes, keepdim).numel(), 1)
    return torch.div(data.sum(axes, keepdim=keepdim), count, rounding_mode="trunc").to(data.dtype)


def _product(data: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        data = data.prod(axis, keepdim=keepdim, dtype=data.dtype)
    return data


def _lowest(dtype: torch.dtype) -> float | int | bool:
    if dtype is torch.bool:
        return False
    return -torch.inf if dtype.is_floating_point else torch.iinfo(dtype).min


def _highest(dtype: torch.dtype) -> float | int | bool:
    if dtype is torch.bool:
        return True
    return torch.inf if dtype.is_floating_point else torch.iinfo(dtype).max


def _filled(data: Tensor, axes: tuple[int, ...], keepdim: bool, value: float | int | bool) -> Tensor:
    """What an extreme over no elements is: `value`."""
    shape = _total(data.to(torch.int64), axes, keepdim).shape
    return torch.full(shape, value, dtype=data.dtype, device=data.device)


def _maximum(data: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    if data.numel() == 0:
        return _filled(data, axes, keepdim, _lowest(data.dtype))
    return data.amax(axes, keepdim=keepdim)


def _minimum(data: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    if data.numel() == 0:
        return _filled(data, axes, keepdim, _highest(data.dtype))
    return data.amin(axes, keepdim=keepdim)


def _l1(data: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    return _total(data.abs(), axes, keepdim)


def _sum_of_squares(data: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    return _total(data * data, axes, keepdim)


def _l2(data: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    return _sum_of_squares(data, axes, keepdim).sqrt().to(data.dtype)


def _log_sum(data: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    return _total(data, axes, keepdim).log().to(data.dtype)


def _log_sum_exp(data: Tensor, axes: tuple[int, ...], keepdim: bool) -> Tensor:
    return torch.logsumexp(data, axes, keepdim=keepdim).to(data.dtype)


def arg_max(data: Tensor, /, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Index of the first (or last) largest value along `axis`, int64."""
    if select_last_index:
        return data.shape[axis] - 1 - torch.argmax(data.flip(axis), axis, keepdim=bool(keepdims))
    return torch.argmax(data, axis, keepdim=bool(keepdims))


def arg_min(data: Tensor, /, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Index of the first (or last) smallest value along `axis`, int64."""
    if select_last_index:
        return data.shape[axis] - 1 - torch.argmin(data.flip(axis), axis, keepdim=bool(keepdims))
    return torch.argmin(data, axis, keepdim=bool(keepdims))


def top_k(x: Tensor, /, k: list[int], *, axis: int = -1, largest: int = 1, sorted: int = 1) -> tuple[Tensor, Tensor]:
    """The k largest (or smallest) values along `axis` in order, and their indices; among equals the first ones."""
    del sorted  # any order will do where it is 0, this one too
    values, places = torch.sort(x, dim=axis, descending=bool(largest), stable=True)
    return values.narrow(axis, 0, k[0]), places.narrow(axis, 0, k[0])


@dataclass(frozen=True)
class Running:
    """An operator Cum*: `function(x, axis)` of all elements up to each one."""

    function: Callable[[Tensor, int], Tensor]
    neutral: int

    def __call__(self, x: Tensor, axis: int, /, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
        """Run along `axis`, from the end with `reverse`; an element leaves itself out with `exclusive`."""
        data = x.flip(axis) if reverse else x
        if exclusive:
            first = torch.full_like(data.narrow(axis, 0, 1), self.neutral)
            data = torch.cat([first, data.narrow(axis, 0, data.shape[axis] - 1)], axis)
        made = self.function(data, axis).to(x.dtype)
        return made.flip(axis) if reverse else made


OPS: dict[str, Handler] = {
    "ArgMax": arg_max,
    "ArgMin": arg_min,
    "CumProd": Running(torch.cumprod, 1),
    "CumSum": Running(torch.cumsum, 0),
    "ReduceL1": Reduction(_l1),
    "ReduceL2": Reduction(_l2),
    "ReduceLogSum": Reduction(_log_sum),
    "ReduceLogSumExp": Reduction(_log_sum_exp),
    "ReduceMax": Reduction(_maximum),
    "ReduceMean": Reduction(_mean),
    "ReduceMin": Reduction(_minimum),
    "ReduceProd": Reduction(_product),
    "ReduceSum": Reduction(_total),
    "ReduceSumSquare": Reduction(_sum_of_squares),
    "TopK": top_k,
}
