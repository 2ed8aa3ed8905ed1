"""Convolutions of one, two or three spatial axes."""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

from onnxq.torch_exec.binding import Handler
from onnxq.torch_exec.ops.windows import AutoPad, for_torch, paddings

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_TRANSPOSED = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


def conv(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    /,
    *,
    auto_pad: AutoPad = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """[batch, in, ...] by [out, in / group, ...] to [batch, out, ...]. `kernel_shape` repeats the shape of `w`."""
    del kernel_shape
    axes = w.ndim - 2
    strides, dilations = strides or [1] * axes, dilations or [1] * axes
    around = paddings(list(x.shape[2:]), list(w.shape[2:]), strides, dilations, pads, auto_pad)
    if any(before != behind for before, behind in around):
        x, around = F.pad(x, for_torch(around)), [(0, 0)] * axes
    made: Tensor = _CONV[axes](x, w, b, strides, [before for before, _ in around], dilations, group)
    return made


def conv_transpose(
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    /,
    *,
    auto_pad: AutoPad = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """[batch, in, ...] by [in, out / group, ...] to [batch, out, ...]: the full result, cropped by the pads.

    An axis of size n gives stride (n - 1) + window + output_padding - pads. Where `output_shape` or SAME_* fixes that
    size, the pads follow from it; an odd one is cropped behind for SAME_UPPER, before otherwise.
    """
    del kernel_shape
    axes = w.ndim - 2
    strides, dilations, extra = strides or [1] * axes, dilations or [1] * axes, output_padding or [0] * axes
    full: Tensor = _TRANSPOSED[axes](x, w, None, strides, 0, 0, group, dilations)
    wanted = output_shape[-axes:] if output_shape else None
    if wanted is None and auto_pad.startswith("SAME"):
        wanted = [size * stride for size, stride in zip(x.shape[2:], strides, strict=True)]
    crops = [(0, 0)] * axes
    if wanted is not None:
        crops = _crops(full, wanted, extra, auto_pad)
    elif pads is not None and auto_pad == "NOTSET":
        crops = list(zip(pads[:axes], pads[axes:], strict=True))
    grow = [(-before, more - behind) for (before, behind), more in zip(crops, extra, strict=True)]
    made = F.pad(full, for_torch(grow)) if any(grow) else full
    return made if b is None else made + b.reshape(-1, *[1] * axes)


def _crops(full: Tensor, wanted: list[int], extra: list[int], auto_pad: AutoPad) -> list[tuple[int, int]]:
    found = []
    for size, more, target in zip(full.shape[2:], extra, wanted, strict=True):
        total = size + more - target
        small = total // 2
        found.append((small, total - small) if auto_pad == "SAME_UPPER" else (total - small, small))
    return found


OPS: dict[str, Handler] = {"Conv": conv, "ConvTranspose": conv_transpose}
