"""Normalisations. Types narrower than float32 are normalised in float32, as `stash_type` 1 asks for."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - the usual name
from torch import Tensor

from onnxq.torch_exec.binding import Handler


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _per_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 2))


def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    /,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    training_mode: Literal[0] = 0,
) -> Tensor:
    """Inference: scale (x - mean) / sqrt(variance + epsilon) + bias per channel. `momentum` is for training."""
    del momentum, training_mode
    slope = scale * torch.rsqrt(variance + epsilon)
    return (x * _per_channel(slope, x) + _per_channel(bias - mean * slope, x)).to(x.dtype)


def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, /, *, epsilon: float = 1e-5) -> Tensor:
    """Each channel of each item with mean 0 and variance 1, then scale and bias per channel."""
    return group_normalization(x, scale, bias, num_groups=x.shape[1], epsilon=epsilon)


def group_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    /,
    *,
    num_groups: int,
    epsilon: float = 1e-5,
    stash_type: Literal[1] = 1,
) -> Tensor:
    """Each group of channels with mean 0 and variance 1, then scale and bias per channel.

    `scale` and `bias` have one value per channel (operator set 21) or per group (18).
    """
    del stash_type
    wide = _wide(x)
    parts = wide.reshape(x.shape[0], num_groups, -1)
    variance, mean = torch.var_mean(parts, 2, correction=0, keepdim=True)
    made = ((parts - mean) * torch.rsqrt(variance + epsilon)).to(x.dtype)
    if scale.numel() == num_groups:
        return (made * scale.reshape(-1, 1) + bias.reshape(-1, 1)).reshape(x.shape)
    return made.reshape(x.shape) * _per_channel(scale, x) + _per_channel(bias, x)


def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    /,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: Literal[1] = 1,
    num_outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Mean 0 and variance 1 over the axes from `axis` on, then scale and bias; also the mean and 1 / deviation."""
    del stash_type
    axes = tuple(range(axis % x.ndim, x.ndim))
    sizes = x.shape[axes[0] :]
    wide = _wide(x)
    made = F.layer_norm(wide, sizes, eps=epsilon).to(x.dtype) * scale
    made = made if bias is None else made + bias
    if num_outputs == 1:
        return (made,)
    variance, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
    return made, mean, torch.rsqrt(variance + epsilon)


def rms_normalization(
    x: Tensor, scale: Tensor, /, *, axis: int = -1, epsilon: float = 1e-5, stash_type: Literal[1] = 1
) -> Tensor:
    """X over its root mean square on the axes from `axis` on, times scale."""
    del stash_type
    axes = tuple(range(axis % x.ndim, x.ndim))
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + epsilon)).to(x.dtype) * scale


def lp_normalization(x: Tensor, /, *, axis: int = -1, p: Literal[1, 2] = 2) -> Tensor:
    """X over its L1 or L2 norm along `axis`; 0 where that is 0."""
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm))


def mean_variance_normalization(x: Tensor, /, *, axes: list[int] | None = None) -> Tensor:
    """(x - mean) / (deviation + 1e-9) over `axes`, by default all but the channels."""
    over = tuple(axes) if axes is not None else (0, 2, 3)
    variance, mean = torch.var_mean(x, over, correction=0, keepdim=True)
    return (x - mean) / (variance.sqrt() + 1e-9)


def lrn(x: Tensor, /, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0) -> Tensor:
    """X / (bias + alpha / size * sum of squares of `size` neighbouring channels) ** beta."""
    before = (size - 1) // 2
    squares = F.pad(x.square().movedim(1, -1), [before, size - 1 - before])
    sums = squares.unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    return x / (bias + alpha / size * sums) ** beta


OPS: dict[str, Handler] = {
    "BatchNormalization": batch_normalization,
    "GroupNormalization": group_normalization,
    "InstanceNormalization": instance_normalization,
    "LRN": lrn,
    "LayerNormalization": layer_normalization,
    "LpNormalization": lp_normalization,
    "MeanVarianceNormalization": mean_variance_normalization,
    "RMSNormalization": rms_normalization,
}
