"""How far a block's output is from the float network's: what the learned methods minimise.

    mse      mean (a - b)^2 / mean b^2
    mae      mean |a - b| / mean |b|
    huber    mean h(a - b) / mean |b|,    h(d) = d^2 / (2 step) where |d| < step, else |d| - step / 2

with a the output found and b the float one. The absolute error keeps a few huge errors, of outlier channels or samples,
from deciding everything; near its minimum its gradient does not shrink, which Huber's does within one output step.

Absolute error for re-parameterized networks: "RepAPQ", arXiv 2402.16121.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from onnxq.errors import UsageError
from onnxq.types import Feeds, Tuned

Loss = Callable[[Tensor, Tensor], Tensor]
"""Of what was found and the target, both of one shape; a scalar."""

LOSSES = ("mse", "mae", "huber")
TINY = 1e-12
STEPS = 255
"""Where an output is not rounded, this many steps span its targets."""


def squared(found: Tensor, target: Tensor) -> Tensor:
    """Noise power over signal power."""
    return torch.mean((found - target) ** 2) / torch.mean(target**2).clamp_min(TINY)


def absolute(found: Tensor, target: Tensor) -> Tensor:
    """Mean magnitude of the noise over that of the signal."""
    return torch.mean(torch.abs(found - target)) / torch.mean(torch.abs(target)).clamp_min(TINY)


def huber(step: float) -> Loss:
    """Like `absolute`, but parabolic for errors below `step` (above 0)."""

    def smooth(found: Tensor, target: Tensor) -> Tensor:
        error = torch.nn.functional.huber_loss(found, target, delta=step) / step
        return error / torch.mean(torch.abs(target)).clamp_min(TINY)

    return smooth


def losses_of(name: str, targets: Feeds, tuned: Tuned) -> dict[str, Loss]:
    """The loss called `name` for each of some outputs.

    Args:
        name: One of `LOSSES`.
        targets: One batch of these outputs, from the float network.
        tuned: Huber's step is that of the output's grid here, or else the width of its targets in `STEPS` parts.

    Raises:
        UsageError: There is no such loss.
    """
    if name not in LOSSES:
        raise UsageError(f"a loss is one of {', '.join(LOSSES)}, not {name!r}.")
    if name != "huber":
        return dict.fromkeys(targets, squared if name == "mse" else absolute)
    grids = tuned.plan.tensors
    return {
        output: huber(grids[output].scale if output in grids else max(float(np.ptp(target)) / STEPS, TINY))
        for output, target in targets.items()
    }
