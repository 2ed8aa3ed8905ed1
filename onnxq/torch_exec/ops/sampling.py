"""Reading images at computed places."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

from onnxq.torch_exec.binding import Handler

_MODES = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest", "cubic": "bicubic", "bicubic": "bicubic"}


def grid_sample(
    x: Tensor,
    grid: Tensor,
    /,
    *,
    align_corners: int = 0,
    mode: Literal["linear", "bilinear", "nearest", "cubic", "bicubic"] = "linear",
    padding_mode: Literal["zeros", "border", "reflection"] = "zeros",
) -> Tensor:
    """`x` [batch, channels, ...] at the places `grid` [batch, ..., axes], whose -1 and 1 are the ends of each axis."""
    return F.grid_sample(x, grid, _MODES[mode], padding_mode, bool(align_corners))


def affine_grid(theta: Tensor, size: list[int], /, *, align_corners: int = 0) -> Tensor:
    """The places that the affine map `theta` [batch, axes, axes + 1] gives the pixels of an image of shape `size`."""
    return F.affine_grid(theta, size, bool(align_corners))


OPS: dict[str, Handler] = {"AffineGrid": affine_grid, "GridSample": grid_sample}
