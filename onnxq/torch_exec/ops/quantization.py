"""Codes and what they stand for. Rounding has no gradient here: learned rounding comes in through `replace`."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from onnxq.torch_exec.binding import Handler
from onnxq.torch_exec.ops.convolution import conv
from onnxq.torch_exec.ops.windows import AutoPad


def _along(values: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """Scales or zero points, shaped to broadcast with `x`: one for all, one per index of `axis`, or one per block."""
    if block_size:
        repeated = values.repeat_interleave(block_size, axis)
        return repeated.narrow(axis, 0, x.shape[axis])
    if values.numel() == 1:
        return values.reshape(())
    return values.reshape([-1 if index == axis % x.ndim else 1 for index in range(x.ndim)])


def quantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    /,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
    precision: Literal[0, 1] = 0,
    saturate: int = 1,
) -> Tensor:
    """round(x / scale) + zero_point, half to even, kept inside the integer type. `saturate` concerns floats only."""
    del precision, saturate
    dtype = zero_point.dtype if zero_point is not None else output_dtype or torch.uint8
    codes = torch.round(x / _along(scale, x, axis, block_size))
    if zero_point is not None:
        codes = codes + _along(zero_point, x, axis, block_size).to(codes.dtype)
    limits = torch.iinfo(dtype)
    return codes.clamp(limits.min, limits.max).to(dtype)


def dequantize_linear(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    /,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """(x - zero_point) scale, in the type of `scale`."""
    codes = x.to(torch.int32)
    if zero_point is not None:
        codes = codes - _along(zero_point, x, axis, block_size).to(torch.int32)
    made = codes.to(scale.dtype) * _along(scale, x, axis, block_size)
    return made if output_dtype is None else made.to(output_dtype)


def dynamic_quantize_linear(x: Tensor, /) -> tuple[Tensor, Tensor, Tensor]:
    """uint8 codes of the grid that just holds 0 and all of `x`, its scale and its zero point."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    zero = torch.round((0 - low) / scale).clamp(0, 255).to(torch.uint8)
    return quantize_linear(x, scale, zero), scale, zero


def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None, /) -> Tensor:
    """(a - a_zero) (b - b_zero) in int32; the zero points are one number, or one per row of `a` and column of `b`."""
    left, right = a.to(torch.int32), b.to(torch.int32)
    if a_zero is not None:
        left = left - (a_zero.unsqueeze(-1) if a_zero.ndim == 1 and a_zero.numel() > 1 else a_zero).to(torch.int32)
    if b_zero is not None:
        right = right - b_zero.to(torch.int32)
    return torch.matmul(left, right)


def conv_integer(
    x: Tensor,
    w: Tensor,
    x_zero: Tensor | None = None,
    w_zero: Tensor | None = None,
    /,
    *,
    auto_pad: AutoPad = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Conv of x - x_zero and w - w_zero in int32, summed in float64, which is exact here."""
    data, weight = x.double(), w.double()
    if x_zero is not None:
        data = data - x_zero.double()
    if w_zero is not None:
        weight = weight - (w_zero.double().reshape(-1, *[1] * (w.ndim - 1)) if w_zero.ndim else w_zero.double())
    made = conv(
        data,
        weight,
        auto_pad=auto_pad,
        dilations=dilations,
        group=group,
        kernel_shape=kernel_shape,
        pads=pads,
        strides=strides,
    )
    return made.to(torch.int32)


OPS: dict[str, Handler] = {
    "ConvInteger": conv_integer,
    "DequantizeLinear": dequantize_linear,
    "DynamicQuantizeLinear": dynamic_quantize_linear,
    "MatMulInteger": matmul_integer,
    "QuantizeLinear": quantize_linear,
}
