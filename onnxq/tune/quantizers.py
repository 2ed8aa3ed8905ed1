"""Differentiable grids: what the emitted graph will round, rounded with a gradient.

Steps are learned as s = s0 * exp(d), zero points as z0 + dz and weights in units of their step, so that the same
learning rates serve every tensor. Rounding passes its gradient straight through (Bengio et al., arXiv 1308.3432);
with that, the gradient of a step is the one of Esser et al., "Learned Step Size Quantization", arXiv 1902.08153.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onnxq.grid import SMALLEST_SCALE, Grid
from onnxq.types import TensorGrid, WeightGrid


def round_through(x: Tensor) -> Tensor:
    """`x` rounded half to even; its gradient is passed on unchanged."""
    return x + (torch.round(x) - x).detach()


class ActivationQuantizer(torch.nn.Module):
    """The grid of one activation tensor.

    Args:
        grid: Where it starts.
        learn: Whether it may move.
        drop: Chance that an element passes unrounded while training (QDrop, Wei et al., arXiv 2203.05740).
        cuts: The grid must go on cutting off what it cuts off, because the runtime leaves out the Relu or Clip in
            front of it for that. Its step never grows then, and its zero point stays. A grid whose zero point is its
            lowest or highest code is always taken to be one.

    Attributes:
        log_step: d of s = s0 * exp(d), a scalar.
        shift: dz of z = z0 + dz, a scalar, in codes.
    """

    def __init__(self, grid: TensorGrid, *, learn: bool, drop: float = 0.0, cuts: bool = False) -> None:
        super().__init__()
        self.grid = grid
        self._codes = Grid(grid.bits, grid.signed, symmetric=False)
        self._drop = drop
        self._cuts = cuts or not self._codes.qmin < grid.zero_point < self._codes.qmax
        self.log_step = torch.nn.Parameter(torch.zeros(()), requires_grad=learn)
        self.shift = torch.nn.Parameter(torch.zeros(()), requires_grad=learn and not self._cuts)

    def step(self) -> Tensor:
        """The step, a scalar."""
        return self.grid.scale * torch.exp(self.log_step)

    def forward(self, x: Tensor) -> Tensor:
        """`x` as its codes stand for it."""
        step = self.step()
        zero = round_through(torch.clamp(self.grid.zero_point + self.shift, self._codes.qmin, self._codes.qmax))
        codes = torch.clamp(round_through(x / step) + zero, self._codes.qmin, self._codes.qmax)
        rounded = (codes - zero) * step
        if self.training and self._drop:
            return torch.where(torch.rand_like(x) < self._drop, x, rounded)
        return rounded

    def found(self) -> TensorGrid:
        """The grid as it is now."""
        step = max(
            float(np.float32(self.grid.scale) * np.float32(torch.exp(self.log_step.detach()).cpu())), SMALLEST_SCALE
        )
        zero = int(torch.clamp(torch.round(self.grid.zero_point + self.shift), self._codes.qmin, self._codes.qmax))
        return replace(self.grid, scale=step, zero_point=zero)

    @torch.no_grad()
    def limit(self) -> None:
        """Take back growth of a step that must not grow (`cuts`); to be called after each step of an optimizer."""
        if self._cuts:
            self.log_step.clamp_(max=0.0)


class WeightQuantizer(torch.nn.Module):
    """The grid and the codes of one weight; subclasses say how a code is found.

    Args:
        weight: The float weight.
        grid: Where its steps start.
        learn_steps: Whether they may move.

    Attributes:
        log_steps: d of s = s0 * exp(d), one per step.
        steady: The learning rate of what decides the codes stays as it is, and does not fall to zero.
    """

    steady = False

    def __init__(self, weight: npt.NDArray[np.float32], grid: WeightGrid, *, learn_steps: bool) -> None:
        super().__init__()
        self.grid = grid
        self.codes = Grid(grid.bits)
        self._shape = [1] * weight.ndim
        if grid.axis is not None:
            self._shape[grid.axis] = -1
        self.register_buffer("steps", torch.tensor(grid.scales, dtype=torch.float32), persistent=False)
        self.log_steps = torch.nn.Parameter(torch.zeros(len(grid.scales)), requires_grad=learn_steps)
        self.register_buffer("units", torch.from_numpy(weight.copy()) / self._along(self.steps), persistent=False)

    steps: Tensor
    units: Tensor

    def _along(self, steps: Tensor) -> Tensor:
        return steps.reshape(self._shape)

    def learned_steps(self) -> Tensor:
        """The steps as they are now, one per channel or a single one."""
        return self.steps * torch.exp(self.log_steps)

    def soft_codes(self) -> Tensor:
        """Codes with a gradient, possibly between two integers."""
        raise NotImplementedError

    def hard_codes(self) -> Tensor:
        """Integer codes."""
        raise NotImplementedError

    def penalty(self, progress: float) -> Tensor | None:
        """What to add to the loss when `progress` (0 to 1) of the steps are done; None for nothing."""
        return None

    def forward(self) -> Tensor:
        """The weight as its codes stand for it."""
        return self.soft_codes() * self._along(self.learned_steps())

    @torch.no_grad()
    def found(self) -> tuple[npt.NDArray[np.int8], WeightGrid]:
        """Codes and grid as they are now."""
        codes = self.hard_codes().to(torch.int8).cpu().numpy()
        steps = self.learned_steps().cpu().numpy()
        return codes, replace(self.grid, scales=tuple(map(float, steps)))


class FixedCodes(WeightQuantizer):
    """A weight that stays what given codes stand for.

    Args:
        codes: int8 codes in the weight's shape.
        grid: Their steps.
    """

    def __init__(self, codes: npt.NDArray[np.int8], grid: WeightGrid) -> None:
        super().__init__(codes.astype(np.float32), grid, learn_steps=False)
        self.register_buffer("given", torch.from_numpy(codes.astype(np.float32)), persistent=False)

    given: Tensor

    def soft_codes(self) -> Tensor:
        """The given codes."""
        return self.given

    def hard_codes(self) -> Tensor:
        """The given codes."""
        return self.given
