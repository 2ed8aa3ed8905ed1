"""How wide a weight is: three measures that a training loss can push down, all differentiable and safe.

Every function takes rows [rows, elements], one row per step of the later grid (one row for a weight with a single step,
one per output channel otherwise), and returns one value per row.

    linf            max |w|
    top_mean        mean of the k largest |w|
    margin          |M| + (1/k) sum relu(|w| - |M|)
    soft_range      smax - smin,   smax = sum w softmax(a w),   smin = sum w softmax(-a w)
    soft_min_max    soft_range + exp(-a), where a wants to grow once the range is settled

The least `margin` over all M is `top_mean` (M is then the k-th largest magnitude): k = 1 is `linf`, and k = all is the
mean magnitude. `soft_range` goes from 0 at a = 0, where both sums are the mean, to max - min for large a.

M. Cho et al., "R^2: Range Regularization for Model Compression and Quantization", arXiv 2303.08253 (1/k is ours).
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST_SPREAD = 0.1
"""A row counts as at least this share of its weight's root mean square: dead channels are not blown up."""
TINY = 1e-12


def rows_of(weight: Tensor, axis: int | None) -> Tensor:
    """`weight` as one row per index of the kept `axis`, or as a single row for None."""
    return weight.reshape(1, -1) if axis is None else weight.movedim(axis, 0).flatten(1)


def linf(rows: Tensor) -> Tensor:
    """The largest magnitude; equal ones share its gradient, all others have none."""
    return rows.abs().amax(dim=1)


def top_mean(rows: Tensor, count: int) -> Tensor:
    """The mean of the `count` largest magnitudes."""
    return rows.abs().topk(count, dim=1).values.mean(dim=1)


def margin(rows: Tensor, bound: Tensor, count: int) -> Tensor:
    """|M| and the mean, as if over `count` elements, of what exceeds it; `bound` is M, one per row."""
    limit = bound.abs()
    return limit + torch.relu(rows.abs() - limit[:, None]).sum(dim=1) / count


def soft_range(rows: Tensor, temperature: Tensor) -> Tensor:
    """The soft maximum minus the soft minimum; `temperature` is a >= 0, one per row or a scalar.

    The largest (smallest) element is subtracted first, so that no exponent is positive: any finite `temperature`
    gives finite values and gradients.
    """
    a = temperature.reshape(-1, 1)
    return _soft_excess(rows, a) + _soft_excess(-rows, a) + rows.amax(dim=1) - rows.amin(dim=1)


def _soft_excess(rows: Tensor, a: Tensor) -> Tensor:
    """The soft maximum minus the maximum, which is at most 0."""
    below = rows - rows.amax(dim=1, keepdim=True)
    return (below * torch.softmax(a * below, dim=1)).sum(dim=1)


def soft_min_max(rows: Tensor, temperature: Tensor) -> Tensor:
    """The soft range plus exp(-a); arguments as for `soft_range`."""
    return soft_range(rows, temperature) + torch.exp(-temperature)


def spread(rows: Tensor) -> Tensor:
    """The standard deviation of each row, but at least a tenth of the root mean square over all rows.

    That keeps every measure over it finite, for constant rows and for weights of zeros, too.
    """
    overall = _root(rows.square().mean())
    return torch.maximum(_root(rows.var(dim=1, correction=0)), LEAST_SPREAD * overall).clamp_min(TINY)


def _root(power: Tensor) -> Tensor:
    """The square root, with a gradient of 0 instead of infinity at 0."""
    zero = power <= 0
    return torch.where(zero, torch.zeros_like(power), torch.where(zero, torch.ones_like(power), power).sqrt())
